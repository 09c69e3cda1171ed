"""`python -m decode.sweep` over the variants of a config file, with the bundled model."""

import csv
import json
from pathlib import Path

import jax
import pytest
from pyarrow import parquet

from configs.ablations import dico
from decode import report, sweep
from dllm_jax import opening
from dllm_jax.config import Config
from dllm_jax.data import tasks

SHORT = ("--config.decode.gen_length=32", "--config.decode.batch_size=2", "--config.mesh.data=1")
VARIANTS = """
from configs import dico_semi_ar
VARIANTS = {"dico": {}, "no_guidance": {"weighting": "none"}}
def get_config(name):
    config = dico_semi_ar.get_config()
    config.dico.update(VARIANTS[name])
    return config
"""
THRESHOLDS = """
from configs import threshold
VARIANTS = {"low": (0.3, 0.125), "high": (0.99, 0.125), "coarse": (0.3, 9.0)}
def get_config(name):
    config = threshold.get_config()
    config.threshold.value, config.decode.bucket_waste = VARIANTS[name]
    return config
"""


def test_variants_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, given = tmp_path / "variants.py", tmp_path / "results", tmp_path / "tasks.jsonl"
    file.write_text(VARIANTS)
    samples = [sample for sample in tasks.read(tasks.HELD_OUT_SMALL) if sample["task"] == "copy"][:2]
    given.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    flags = (f"--config={file}", f"--config.input.path={given}", f"--config.output.path={folder}", *SHORT)
    assert sweep.main(["sweep", *flags]) == 0
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0] == "| variant | copy | all | TPF | NFE | divide | conquer | finalize |"
    assert [line.split()[1] for line in lines[2:]] == ["dico", "no_guidance"]
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    for line, name in zip(lines[2:], ("dico", "no_guidance"), strict=True):
        metrics = json.loads((folder / f"{name}.jsonl.metrics.json").read_text())
        cells = [float(cell) for cell in line.split("|")[3:-1]]
        assert cells[0] == metrics["accuracy"]
        assert cells[2] == pytest.approx(sum(cells[3:]), abs=0.2) == pytest.approx(metrics["nfe_mean"], abs=0.2)
    assert metrics["config"]["dico"]["weighting"] == "none"
    table = list(csv.DictReader((folder / "samples.csv").open(newline="")))
    assert [(row["variant"], row["task"]) for row in table] == [("dico", "copy")] * 2 + [("no_guidance", "copy")] * 2
    assert sum(int(row["nfe"]) for row in table[2:]) == metrics["nfe_sum"]
    stored = parquet.read_table(folder / "samples.parquet").to_pylist()
    assert [str(row["text"]) for row in stored] == [row["text"] for row in table]
    assert report.main(["report", str(folder)]) == 0
    assert "Against" in (folder / "report.html").read_text()
    capsys.readouterr()

    loaded, load = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    (folder / "no_guidance.jsonl").unlink()  # as if it had been cut off in its second variant
    (folder / "no_guidance.jsonl.metrics.json").unlink()
    written = (folder / "samples.csv").read_bytes()
    for finished, loads in ((1, 1), (2, 0)):
        loaded.clear()
        capsys.readouterr()
        assert sweep.main(["sweep", *flags]) == 0
        assert (folder / "samples.csv").read_bytes() == written
        out, err = capsys.readouterr()
        assert (err.count("finished already: "), len(loaded)) == (finished, loads)
        assert out.endswith("\n".join(lines) + "\n")
    assert sweep.main(["sweep", *flags, "--config.decode.seed=1"]) == 2
    assert (
        "error: output.path: expected dico.jsonl to be what this job writes, got decode.seed" in capsys.readouterr().err
    )


def test_variants_that_differ_in_numbers_share_their_model_and_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, given = tmp_path / "thresholds.py", tmp_path / "results", tmp_path / "prompts.jsonl"
    file.write_text(THRESHOLDS)
    prompts = [{"id": n, "task": "copy", "answer": "x", "prompt_ids": [1, 3, *[70] * n, 4]} for n in (60, 9, 58, 10, 8)]
    given.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = (f"--config={file}", f"--config.input.path={given}", f"--config.output.path={folder}", *SHORT)
    jax.clear_caches()
    loaded, load = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    assert sweep.main(["sweep", *flags]) == 0
    assert len(loaded) == 1
    metrics = [json.loads((folder / f"{name}.jsonl.metrics.json").read_text()) for name in ("low", "high", "coarse")]
    # Three batches of two prompts, the first of one bucket, the others of another; coarser buckets are others.
    assert [each["compilations"] for each in metrics] == [2, 0, 1]
    assert metrics[0]["nfe_sum"] < metrics[1]["nfe_sum"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config=FILE"], ["dico", "no_guidance"]),
        (["--config", "FILE"], ["dico", "no_guidance"]),
        (["-config=FILE"], ["dico", "no_guidance"]),
        (["-config", "FILE", "--config.decode.gen_length", "64"], ["dico", "no_guidance"]),
        (["--config=none.py", "--config=FILE"], ["dico", "no_guidance"]),
        (["--config=FILE:no_guidance"], ["no_guidance"]),
        ([], list(dico.VARIANTS)),
    ],
)
def test_config_is_parsed_as_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: list[str]
) -> None:
    file = tmp_path / "variants.py"
    file.write_text(VARIANTS)
    ran: dict[str, Config] = {}

    def evaluate(config: Config, *, name: str, finished: dict[str, object], **_: object) -> None:
        ran[name] = finished[name] = config

    monkeypatch.setattr(sweep, "evaluate", evaluate)
    assert sweep.main(["sweep", *(flag.replace("FILE", str(file)) for flag in flags)]) == 0
    assert list(ran) == expected
    if "no_guidance" in ran:
        assert ran["no_guidance"].dico.weighting == "none"
        assert ran["no_guidance"].decode.gen_length == (64 if "64" in flags else 96)


def test_help_lists_the_settings_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["dllm-jax sweep", "--config", "ablations/apd", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: dllm-jax sweep [--config=NAME|FILE]" in out
    assert out.count("Settings, with their values in ablations/apd:R0.0_W0") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config"], "error: Missing value for flag --config"),
        (["--config=ablations/dico:n3"], "error: --config: expected a variant of ablations/dico, one of dico, "),
        (["--config=ablations/dyco"], "error: --config: expected a configuration file or a bundled experiment, got"),
        (["--config=none.py"], "error: --config: expected a configuration file or a bundled experiment, got 'none.py'"),
        (["--config=configs/vanilla.py"], "error: --config: expected a configuration file with VARIANTS, got"),
        ([], "error: output.path: expected a folder, got ''"),
        (["--config.dico.gate=2"], "error: dico.gate: expected 0 to 1, got 2.0"),
    ],
)
def test_mistakes_are_told_once(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["sweep", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(message)
