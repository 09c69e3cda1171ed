"""train.verifier from its flags to its folder: export, measurements, resuming, refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dllm_jax
from dllm_jax.training.verifier import train as module
from dllm_jax.training.verifier.acceptance import HeldOut
from tests.training.commands import ROOT, Execute, Refused, lines, weights

Scored = {"accepted_per_forward": 1.0}


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the slow half of the measurements."""
    monkeypatch.setattr(HeldOut, "_decode", lambda self, verifier: Scored)


def written(tmp_path: Path, *, text: str) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_it_exports_what_it_measured(
    execute: Execute, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported = []
    monkeypatch.setattr(
        module,
        "export",
        lambda model, *args, export=module.export, **kwargs: (exported.append(model), export(model, *args, **kwargs)),
    )
    assert execute() == 0
    out, err = capsys.readouterr()
    assert "tokens accepted per forward" in out
    assert "step 4/6 held_out: loss " in err
    folder, training = tmp_path / "out", tmp_path / "out.training"
    tokens = np.arange(1, 21).reshape(2, 10)
    loaded = dllm_jax.load_model(folder)
    assert (loaded.config.vocab_size, *loaded.config.end_ids) == (512, 0, 5)
    assert np.array_equal(dllm_jax.logits(loaded, tokens), dllm_jax.logits(exported[0], tokens))
    names = {"config.json", "metrics.json", "model.safetensors", "tokenizer.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert {path.name for path in training.iterdir()} == {"metrics.jsonl", "tensorboard"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["train"]["steps"] == 6
    assert metrics["held_out_samples"] == 5
    measured = {"loss", "token_accuracy", "accepted_per_forward", "tokens_per_forward", "accuracy", "accuracy_sort"}
    assert measured <= set(metrics)
    assert [(line["step"], line["group"]) for line in lines(training)] == [
        (2, "train"),
        (4, "train"),
        (4, "held_out"),
        (6, "train"),
        (6, "held_out"),
    ]
    assert lines(training)[-1]["token_accuracy"] == metrics["token_accuracy"]


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("failure", [3, 5])
def test_an_interrupted_run_ends_with_the_same_bits(
    execute: Execute, stop_after: Callable[[int | None], None], tmp_path: Path, failure: int
) -> None:
    settings = "train.ema=0.9"
    whole = tmp_path / "whole"
    assert execute(settings, f"output.path={whole}") == 0
    stop_after(failure)
    with pytest.raises(RuntimeError, match="power cut"):
        execute(settings)
    assert not (tmp_path / "out").exists()
    with (tmp_path / "out.training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "gro')
    stop_after(None)
    assert execute(settings) == 0
    assert weights(tmp_path / "out") == weights(whole)
    continued, uninterrupted = (lines(tmp_path / f"{name}.training") for name in ("out", "whole"))
    assert continued[-2:] == uninterrupted[-2:]
    assert [line["step"] for line in continued] == [line["step"] for line in uninterrupted]


@pytest.mark.usefixtures("no_decoding")
def test_an_interrupted_run_with_other_settings_is_refused(
    execute: Execute,
    refused: Refused,
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(3)
    with pytest.raises(RuntimeError):
        execute()
    stop_after(None)
    capsys.readouterr()
    expected = "the interrupted run in out.training to have the same settings, got train.b2 0.98 instead of 0.9"
    assert expected in refused("train.b2=0.9")
    assert execute("train.b2=0.9", "output.overwrite=true") == 0
    assert [line["step"] for line in lines(tmp_path / "out.training")] == [2, 4, 4, 6, 6]


@pytest.mark.usefixtures("no_decoding")
def test_a_finished_verifier_is_replaced_only_if_told(execute: Execute, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "output.path: expected a folder that does not exist, or output.overwrite=true" in refused()
    assert "expected a checkpoint folder to overwrite" in refused("output.overwrite=true")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert execute("output.overwrite=true") == 0
    assert weights(tmp_path / "out")


@pytest.mark.usefixtures("no_decoding")
def test_a_finished_run_says_so_and_other_weights_are_refused(
    execute: Execute,
    refused: Refused,
    stop_after: Callable[[int | None], None],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(teacher, tmp_path / "copy"))
    model = f"model.path={copy}"
    assert execute(model) == 0
    first = capsys.readouterr().out
    stop_after(3)
    with pytest.raises(RuntimeError, match="power cut"):
        execute(model, f"output.path={tmp_path / 'cut'}")
    capsys.readouterr()
    monkeypatch.setattr(module, "open_teacher", lambda *args: pytest.fail("the model was loaded"))
    assert execute(model) == 0
    assert capsys.readouterr() == (first, f"finished already: {tmp_path / 'out'}\n")
    assert "got train.b2 0.98 instead of 0.9 (output.overwrite=true replaces it)" in refused(model, "train.b2=0.9")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    for folder in ("out", "cut"):
        line = refused(model, f"output.path={tmp_path / folder}")
        assert "got another model.safetensors of model.path (output.overwrite=true" in line
    own = (model, f"output.path={copy}", "output.overwrite=true")
    assert "output.path: expected a place apart from model.path" in refused(*own)


@pytest.mark.usefixtures("no_decoding")
def test_it_learns_from_own_lines_and_holds_some_out(execute: Execute, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus 1?", "answer": f"{i + 1}"} for i in range(20)]
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}]} for i in "ab"]
    path = written(tmp_path, text="\n".join(map(json.dumps, [*rows, *chats, rows[0]])))
    assert execute(f"data.path={path}", "data.eval_samples=2") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["held_out_samples"] == 2
    assert metrics["training_samples"] == 20  # the repeated first line is held out with its twin


@pytest.mark.usefixtures("no_decoding")
def test_it_learns_the_models_own_answers(execute: Execute, refused: Refused, tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"{i} plus 1?"} for i in range(9)]
    path, answers = written(tmp_path, text="\n".join(map(json.dumps, rows))), tmp_path / "answers.jsonl"
    settings = [f"data.path={path}", f"data.distill_path={answers}", "data.eval_samples=1"]
    assert execute(*settings) == 0
    first = answers.stat().st_mtime_ns
    decoded = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["id"] for row in decoded] == list(range(9))
    assert execute(*settings, f"output.path={tmp_path / 'again'}") == 0
    assert answers.stat().st_mtime_ns == first
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    other = f"output.path={tmp_path / 'other'}"
    assert "got threshold.value 0.9 instead of 0.8" in refused(*settings, other, "threshold.value=0.8")
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    assert "got other prompts" in refused(*settings, other)
    path.write_text("\n".join(map(json.dumps, [{"id": 0, "prompt": "else?"}, *rows[1:]])))  # the same ids
    assert "data.distill_path: expected answers.jsonl to be" in refused(*settings, other)
    same = f"data.distill_path={path}"
    assert "data.distill_path: expected a place apart from input.path" in refused(settings[0], same, other)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "hi"}', "own.jsonl:2: answer: expected a string that is not empty, got None"),
        ('{"answer": "hi"}', "own.jsonl:2: expected exactly one of prompt, messages, prompt_ids, got none"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "own.jsonl:2: messages: expected a question"),
        (
            json.dumps({"prompt": "oak " * 99, "answer": "oak " * 99}),
            "own.jsonl:2: prompt and answer: expected at most",
        ),
    ],
)
@pytest.mark.usefixtures("no_decoding")
def test_bad_lines_fail_or_are_left_out(
    execute: Execute, refused: Refused, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, expected: str
) -> None:
    good = '{"prompt": "hi", "answer": "ho"}\n{"prompt": "ho", "answer": "hi"}\n'
    path = written(tmp_path, text=good.replace("\n", f"\n{line}\n", 1))
    assert expected in refused(f"data.path={path}")
    assert execute(f"data.path={path}", "data.on_error=skip", "train.steps=2") == 0
    assert "left out 1 bad input line(s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.warmup_steps=6"], "train.warmup_steps: expected below train.steps 6, got 6"),
        (["train.ema=1"], "train.ema: expected at least 0 and below 1, got 1.0"),
        (["network.num_kv_heads=3"], "network.num_kv_heads: expected a divisor of num_heads 4, got 3"),
        (["network.embed_dim=20"], "network.embed_dim: expected an even multiple of num_heads 4, got 20"),
        (
            ["mesh.data=4"],
            "train.batch_size: expected a multiple of mesh.data * mesh.fsdp * train.microbatches = 4",
        ),
        (["mesh.data=16"], "mesh.data * mesh.fsdp * mesh.tensor: expected at most 8"),
        (["output.path="], "output.path: expected the folder to write the verifier to, got none"),
        (["data.path=/no/such.jsonl"], "data.path: expected a readable file, got '/no/such.jsonl'"),
        (["data.eval_path=/no/such.jsonl"], "data.eval_path: expected a readable file"),
        (["data.length=20"], "built-in tasks:1: prompt and answer: expected at most 20 tokens (data.length), got "),
        (["decode.gen_length=1140", "decode.block_length=0"], "longest held-out prompt, got one that leaves 12"),
        (["model.path=/no/such"], "model.path: expected a folder or one of"),
        (["train.stesp=3"], "unknown config field, close to --config.train.steps"),
    ],
)
def test_mistakes_are_one_line(refused: Refused, tmp_path: Path, settings: list[str], expected: str) -> None:
    assert expected in refused(*settings)
    assert not list(tmp_path.glob("out*"))


def test_help_and_missing_packages_need_no_jax() -> None:
    code = (
        "import importlib.util, sys; from train import verifier; from dllm_jax import cli\n"
        "from dllm_jax.training.verifier.config import VerifierTraining\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'grain' else find(name)\n"
        "codes = [cli.execute(verifier.main, ['x', *flags], description='', schema=VerifierTraining,\n"
        "                     default_config='configs/train_verifier.py') for flags in (['--help'], [])]\n"
        "assert codes == [0, 2] and not {'jax', 'grain'} & set(sys.modules), codes"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        0,
        "error: packages: expected those of pip install 'dllm_jax[train]', got no grain\n",
    )
    assert "--config.train.*" in done.stdout


@pytest.mark.slow
def test_a_killed_command_ends_with_the_same_bits(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """Killed for good in the middle of the training, several times, then left alone."""
    settings = ["train.steps=60", "train.checkpoint_every=4", "train.eval_every=50", "train.log_every=1"]

    def start(output: Path) -> subprocess.Popen[str]:
        _, *flags = arguments(*settings, f"output.path={output}")
        command = [sys.executable, "-m", "train.verifier", *flags]
        return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole).wait(timeout=600) == 0
    metrics = tmp_path / "out.training" / "metrics.jsonl"
    for step in (10, 25, 41):
        process = start(out)
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    process = start(out)
    assert process.wait(timeout=600) == 0
    assert weights(out) == weights(whole)
