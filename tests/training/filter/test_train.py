"""`train.filter` from prompts to a filter that decodes, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dllm_jax
from dllm_jax import cli
from dllm_jax.checkpoints.filters import load_filter, to_arrays
from dllm_jax.config import Config
from dllm_jax.data import tasks
from dllm_jax.settings import DecodeSettings, FilterSettings
from dllm_jax.training.filter import collect as collecting
from dllm_jax.training.filter import train as training
from dllm_jax.training.filter.config import FilterTraining
from train.filter import main

ROOT = Path(__file__).parents[3]
FLAGS = (
    "data.prompts=9",
    "data.eval_prompts=4",
    "decode.gen_length=16",
    "decode.block_length=8",
    "decode.batch_size=4",
    "fit.epochs=40",
    "fit.checkpoint_every=10",
    "report.thresholds=0.5",
    "mesh.data=1",
)
Run = Callable[..., int]


@pytest.fixture
def run(teacher: Path, tmp_path: Path) -> Run:
    """Call it with settings: runs the command in this process and returns its exit code."""

    def execute(*settings: str) -> int:
        given = (*FLAGS, f"model.path={teacher}", f"output.path={tmp_path / 'out'}", *settings)
        arguments = ["train.filter", *(f"--config.{setting}" for setting in given)]
        config = str(ROOT / "configs" / "train_filter.py")
        return cli.execute(main, arguments, description="", default_config=config, schema=FilterTraining)

    return execute


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return to_arrays(load_filter(folder).params)


def assert_same(one: Path, other: Path) -> None:
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[name])


@pytest.mark.slow
def test_it_exports_what_it_measured(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    out = tmp_path / "out"
    assert "oracle" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["policy"] for row in metrics["comparison"]] == [
        "low_confidence",
        "threshold 0.5",
        "factor 1.0",
        "learn2pd 0.96",
        "learn2pd 0.96 + eot",
        "oracle",
    ]
    first, *others, oracle = metrics["comparison"]
    assert first["agreement"] == oracle["agreement"] == 1
    assert first["nfe"] == 16
    assert all(oracle["nfe"] < 16 for row in others)
    assert (
        metrics["records"] == metrics["training_records"] + metrics["validation_records"] + metrics["test"]["records"]
    )
    assert metrics["parameters"] == 8 * 32 + 32 + 32 * 8 + 8
    assert all((out / name).stat().st_size > 10_000 for name in ("fit.png", "quality.png"))
    assert (tmp_path / "out.training" / "metrics.jsonl").exists()
    assert not (tmp_path / "out.training" / "settings.json").exists()

    decode = DecodeSettings(policy="learn2pd", gen_length=16, block_length=8)
    model = dllm_jax.load_model(teacher)
    found = dllm_jax.decode(model, [[1, 3, 70, 4]], Config(decode=decode, filter=FilterSettings(str(out))))
    given = dllm_jax.decode(model, [[1, 3, 70, 4]], Config(decode=decode), filter_params=arrays(out / "params"))
    np.testing.assert_array_equal(found.tokens_BG, given.tokens_BG)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("data.eval_prompts=0", "fit.patience=1000", "mesh.data=2")
    assert run(*quick, f"output.path={tmp_path / 'whole'}") == 0
    replay, decoded = collecting.replay, []

    def stumbling(*args: Any, **kwargs: Any) -> Any:
        decoded.append(kwargs["rows"])
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return replay(*args, **kwargs)

    monkeypatch.setattr(collecting, "replay", stumbling)
    assert run(*quick) == cli.INTERRUPTED
    assert run(*quick, "fit.learning_rate=0.1") == 2
    assert "got fit.learning_rate 0.003 instead of 0.1" in capsys.readouterr().err

    def late(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "quality", late)
        assert run(*quick) == cli.INTERRUPTED  # the fit is over, nothing is exported
    assert not (tmp_path / "out").exists()
    batches = len(decoded)
    assert run(*quick, "data.eval_prompts=2") == 0  # the report decodes with what the checkpoint gave
    assert len(decoded) == batches  # no record was made again
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_records_are_kept_for_other_filters(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = f"data.records_path={tmp_path / 'records'}"
    assert run(kept, "data.eval_prompts=0") == 0
    monkeypatch.setattr(collecting, "replay", None)  # nothing may be decoded any more
    deeper = ("network.num_layers=3", "network.width=5", f"output.path={tmp_path / 'deeper'}")
    assert run(kept, "data.eval_prompts=0", *deeper) == 0
    assert {name: array.shape for name, array in arrays(tmp_path / "deeper").items()} == {
        "linear1.weight": (5, 8),
        "linear1.bias": (5,),
        "linear2.weight": (5, 5),
        "linear2.bias": (5,),
        "linear3.weight": (8, 5),
        "linear3.bias": (8,),
    }


def test_a_finished_run_says_so_and_other_weights_are_refused(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(teacher, tmp_path / "copy"))
    settings = (f"model.path={copy}", "data.eval_prompts=0", f"data.records_path={tmp_path / 'records'}")
    assert run(*settings) == 0
    capsys.readouterr()
    monkeypatch.setattr(training, "open_decoder", lambda *args: pytest.fail("the model was loaded"))
    assert run(*settings) == 0
    out, err = capsys.readouterr()
    assert err == f"finished already: {tmp_path / 'out'}\n"
    assert "records; prepare " in out
    assert run(*settings, "data.eval_prompts=1") == 2
    assert "got data.eval_prompts 0 instead of 1 (output.overwrite=true replaces it)" in capsys.readouterr().err
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))
    for field, output in (("output.path", "out"), ("data.records_path", "other")):
        assert run(*settings, f"output.path={tmp_path / output}") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {field}: expected ")
        assert "got another config.json of model.path (output.overwrite=true" in err


def test_a_file_of_questions(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [sample for task in ("copy", "sort") for sample in tasks.generate(task, 6, seed=1)]
    questions = [{"question": sample["prompt"], "answer": f"So.\n#### {i}"} for i, sample in enumerate(drawn)]
    given = lines(tmp_path / "questions.jsonl", [*questions, {"question": "How many?"}])
    assert run(f"data.path={given}", "data.prompts=20") == 2
    assert f"{given}:13: answer: expected a string that is not empty, got None" in capsys.readouterr().err
    assert run(f"data.path={given}", "data.prompts=20", "data.on_error=skip") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["comparison_prompts"] == 1  # the test share of the file's
    assert "accuracy" not in metrics["comparison"][0]


def test_a_damaged_record_file_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    settings = (f"data.records_path={records}", "data.eval_prompts=0")
    assert run(*settings) == 0
    shutil.rmtree(tmp_path / "out")
    shard = sorted(records.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    capsys.readouterr()
    assert run(*settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {shard}: expected a complete safetensors file of records")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for overwrite in ("false", "true"):
        assert run(f"data.records_path={mine}", f"output.overwrite={overwrite}") == 2
        assert f"data.records_path: expected a folder of records, or a new or empty one, got {mine}" in (
            capsys.readouterr().err
        )
        assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.prompts=2"], "data.prompts: expected at least 3, got 2"),
        (["data.path=nowhere.jsonl"], "data.path: expected a readable file, got 'nowhere.jsonl'"),
        (["decode.policy=threshold"], "decode.policy: expected low_confidence, for answers decoded one by one"),
        (["decode.stop=eot"], "decode.stop: expected none"),
        (["decode.temperature=0.5"], "decode.temperature: expected 0.0"),
        (["decode.steps=4"], "decode.steps: expected 0, for answers decoded one by one, got 4"),
        (["decode.logits_eos_inf=true"], "decode.logits_eos_inf: expected False with decode.stop eot, got True"),
        (["decode.compat=reference", "decode.cache=dual"], "decode.compat: expected none with decode.policy learn2pd"),
        (["fit.learning_rate=0"], "fit.learning_rate: expected above 0, got 0.0"),
        (
            ["data.records_path=out/records", "output.path=out"],
            "data.records_path: expected a folder outside output.path",
        ),
        (["network.width=0"], "network.width: expected at least 1, got 0"),
        (["fit.positions=some"], "fit.positions: expected one of all, masked, got 'some'"),
        (["report.thresholds=high"], "report.thresholds: expected numbers from 0 to 1 like 0.85,0.9, got 'high'"),
        (["decode.gen_length=4000"], "expected at most"),
        (["output.path="], "output.path: expected the folder to write the filter to, got none"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, tmp_path: Path, settings: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*settings) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert expected in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []
