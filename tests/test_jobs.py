"""decode.run from its flags to its files: refusals, output lines, metrics, and continuing an unfinished run."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from decode.run import main
from dllm_jax import cli, jobs, opening
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import text
from dllm_jax.data.prompts import Prompt
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.settings import TokenizerSettings

ROOT = Path(__file__).parents[1]
TINY = ASSETS / "llada-tiny"
WORDS = (2, 9, 3, 2, 8)  # of the lists to copy: two buckets of padded length


class CountedDecoder(Decoder):
    """Takes 1 s to compile and 2 s to decode every batch, notes its rows, and fails when `batches_left` runs out."""

    batches_left = 0
    rows: ClassVar[list[int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], *, rows: Sequence[int] | None = None) -> DecodeResult:
        if not self.batches_left:
            raise RuntimeError("out of memory")
        type(self).batches_left -= 1
        self.rows.extend(rows or ())
        result = super().__call__(prompts, rows=rows)
        timing = dataclasses.replace(result.timing, compile_seconds=1.0, decode_seconds=2.0, compilations=1)
        return dataclasses.replace(result, timing=timing)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with the number of batches after which decoding fails."""

    def set_limit(batches: int) -> None:
        monkeypatch.setattr(CountedDecoder, "batches_left", batches)
        monkeypatch.setattr(CountedDecoder, "rows", [])

    monkeypatch.setattr(jobs, "Decoder", CountedDecoder)
    set_limit(100)
    return set_limit


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    codec = text.load(TINY, TokenizerSettings())
    assert codec
    with (tmp_path / "in.jsonl").open("w") as file:
        for i, words in enumerate(WORDS):
            listed = ", ".join(["oak", "red", "tea"] * 3)[: 5 * words - 2]
            prompt = Prompt(index=i, line=i, id=i, text=f"Copy the list: {listed}.")
            file.write(json.dumps({"id": f"p{i}", "prompt_ids": codec.encode(prompt)}) + "\n")
    return tmp_path / "in.jsonl"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def execute(*settings: str) -> int:
    base = ["mesh.data=1", "decode.gen_length=16", "decode.block_length=16", "decode.steps=2", "decode.batch_size=2"]
    base.append("decode.refill=0")  # batch after batch
    argv = ["run", *(f"--config.{setting}" for setting in (*base, *settings))]
    return cli.execute(main, argv, description="", default_config=str(ROOT / "configs" / "vanilla.py"))


def refused(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """The error line of a run that must not start."""
    capsys.readouterr()  # what came before
    assert execute(*settings) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1), err
    return err


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit_config(checkpoint: Path, **fields: object) -> None:
    values = json.loads((checkpoint / "config.json").read_text()) | fields
    kept = {name: value for name, value in values.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(kept))


def test_missing_model_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.path: expected a folder or one of" in refused(capsys, "model.path=/no/such/model")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_heads": None}, "n_heads"),
        ({"model_type": "gpt5"}, "model_type: expected one of"),
        ({"num_experts": 64}, "expected the field(s) hidden_size, num_attention_heads"),
    ],
)
def test_unsuitable_model_config(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, fields: dict[str, object], expected: str
) -> None:
    edit_config(checkpoint, **fields)
    assert expected in refused(capsys, f"model.path={checkpoint}")


def test_truncated_weights(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 1_000_000)
    assert "model.safetensors" in refused(capsys, f"model.path={checkpoint}")


def test_unknown_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.preset: expected one of llada_8b, " in refused(capsys, "model.preset=llada_9b")


def test_more_devices_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mesh.data * mesh.fsdp * mesh.tensor: expected at most 8" in refused(capsys, "mesh.tensor=64")


def test_tokenizer_of_another_model(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [first | {"id": i, "content": f"<|{i}|>"} for i in range(506, 513)]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.path: expected at most 512 entries" in refused(capsys, f"tokenizer.path={checkpoint}")


def test_folders_without_a_tokenizer(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    assert "tokenizer.path: expected tokenizer.json or" in refused(capsys, f"tokenizer.path={tmp_path}")
    assert "tokenizer.path: expected a folder" in refused(capsys, "tokenizer.path=/no/such/tokenizer")
    (checkpoint / "tokenizer.json").unlink()
    assert "expected prompt_ids, since" in refused(capsys, f"model.path={checkpoint}", "input.prompt=oak")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt_ids": [1, 2', "expected a JSON object"),
        ('{"prompt": ""}', "prompt: expected a string that is not empty"),
        ('{"prompt_ids": [1, 512]}', "prompt: expected token ids from 0 to 511, got 512"),
        (json.dumps({"prompt_ids": [7] * 1137}), "prompt: expected at most 1136 tokens (max_sequence_length 1152"),
        (json.dumps({"prompt": "oak " * 1200}), "prompt: expected at most 1136 tokens"),
    ],
)
def test_bad_line_fails_or_is_left_out(
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    limit: Callable[[int], None],
    tmp_path: Path,
    line: str,
    expected: str,
) -> None:
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([lines[0], line, *lines[2:]]))
    assert f"{prompts}:2: {expected}" in refused(capsys, f"input.path={prompts}")
    out = tmp_path / "out.jsonl"
    assert execute(f"input.path={prompts}", "input.on_error=skip", f"output.path={out}") == 0
    assert f"left out 1 bad input line(s); the first: {prompts}:2: {expected}" in capsys.readouterr().err
    rows = read_rows(out)
    assert [row["id"] for row in rows] == ["p0", "p2", "p3", "p4"]
    assert sorted(CountedDecoder.rows) == [0, 2, 3, 4]  # the others keep their random draws


@pytest.mark.parametrize("name", ["none/out.jsonl", ".", "in.jsonl"])
def test_unwritable_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    line = refused(capsys, f"input.path={prompts}", f"output.path={tmp_path / name}")
    assert f"output.path: expected a {'place apart' if name == 'in.jsonl' else 'file that can be written'}" in line


def test_output_without_permission(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission to write in" in refused(capsys, f"output.path={tmp_path / 'out.jsonl'}")


def test_output_lines_and_metrics(prompts: Path, limit: Callable[[int], None], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert execute(f"input.path={prompts}", f"output.path={out}") == 0
    rows = read_rows(out)
    assert list(rows[0]) == ["id", "text", "output_ids", "num_tokens", "nfe", "commit_step", "finish_reason"]
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert {row["nfe"] for row in rows} == {2}
    assert {len(row["output_ids"]) for row in rows} == {len(row["commit_step"]) for row in rows} == {16}
    metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    tokens = sum(row["num_tokens"] for row in rows)
    expected = {
        "tokens_per_forward": tokens / 10,
        "tokens_per_second": tokens / 6,
        "canvas_tokens_per_second": 5 * 16 / 6,
        "num_samples": 5,
        "num_tokens": tokens,
        "nfe_sum": 10,
        "nfe_mean": 2,
        "timed_samples": 5,
        "iterations": 6,
        "compile_seconds": 3,
        "decode_seconds": 6,
        "compilations": 3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert tokens > 10
    assert metrics["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert metrics["config"]["decode"]["gen_length"] == 16
    assert metrics["config"]["decode"]["cache"] == "none"  # what auto was for this model
    assert metrics["device"]["platform"] == "cpu"
    assert set(metrics["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "dllm_jax"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.metrics.json"]


def test_the_trace_tells_every_step_of_a_row(prompts: Path, limit: Callable[[int], None], tmp_path: Path) -> None:
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    assert execute(f"input.path={prompts}", f"output.path={out}", "output.trace=true") == 0
    assert execute(f"input.path={prompts}", f"output.path={plain}") == 0
    asked = read_rows(prompts)
    for row, without, prompt in zip(read_rows(out), read_rows(plain), asked, strict=True):
        assert row | without == row  # the trace only adds
        assert row["prompt_ids"] == prompt["prompt_ids"]
        assert len(row["pieces"]) == len(row["confidence"]) == 16
        assert "".join(row["pieces"][: row["num_tokens"]]) == row["text"]
        assert all(0 < confidence <= 1 for confidence in row["confidence"])
        assert row["block_length"] == 16


def test_phases_are_counted_and_traced(prompts: Path, limit: Callable[[int], None], tmp_path: Path) -> None:
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    assert execute(f"input.path={prompts}", f"output.path={out}", "decode.policy=dico", "output.trace=true") == 0
    assert execute(f"input.path={prompts}", f"output.path={plain}", "decode.policy=dico") == 0
    rows, phases = read_rows(out), ("divide", "conquer", "finalize")
    for row, without in zip(rows, read_rows(plain), strict=True):
        assert row | without == row
        steps = row["forwards"]
        assert row["forwards_by_phase"] == {phase: sum(step["phase"] == phase for step in steps) for phase in phases}
        assert len(steps) == row["nfe"]
        for number, step in enumerate(steps, 1):
            assert all(row["commit_step"][seed] == number for seed in step["seeds"])
            assert all(0 <= first <= last < 16 for first, last in step["clusters_after"])
    metrics = json.loads(Path(f"{out}.metrics.json").read_text())
    assert metrics["forwards_by_phase"] == {
        phase: sum(row["forwards_by_phase"][phase] for row in rows) for phase in phases
    }
    assert sum(metrics["forwards_by_phase"].values()) == metrics["nfe_sum"]


def test_text_is_null_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], prompts: Path, limit: Callable[[int], None], checkpoint: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert execute(f"input.path={prompts}", f"model.path={checkpoint}") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [None] * 5


def test_a_failing_run_keeps_the_finished_output(prompts: Path, limit: Callable[[int], None], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    limit(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        execute(f"input.path={prompts}", f"output.path={out}", "output.overwrite=true")
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize("torn", ["", '{"index": 4, "id', "\n"])
def test_an_interrupted_run_continues_to_the_same_file(
    prompts: Path, limit: Callable[[int], None], tmp_path: Path, torn: str
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert execute(f"input.path={prompts}", f"output.path={whole}") == 0
    limit(1)
    with pytest.raises(RuntimeError):
        execute(f"input.path={prompts}", f"output.path={out}")
    with (tmp_path / "out.jsonl.partial").open("a") as partial:
        partial.write(torn)
    limit(2)
    assert execute(f"input.path={prompts}", f"output.path={out}") == 0
    assert out.read_bytes() == whole.read_bytes()
    metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    assert (metrics["num_samples"], metrics["timed_samples"], metrics["decode_seconds"]) == (5, 3, 4)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_unfinished_output_of_other_settings_is_refused(
    capsys: pytest.CaptureFixture[str], prompts: Path, limit: Callable[[int], None], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    limit(1)
    with pytest.raises(RuntimeError):
        execute(f"input.path={prompts}", f"output.path={out}")
    limit(100)
    line = refused(capsys, f"input.path={prompts}", f"output.path={out}", "decode.seed=3")
    assert "got decode.seed 0 instead of 3 (output.overwrite=true discards it)" in line
    assert execute(f"input.path={prompts}", f"output.path={out}", "decode.seed=3", "output.overwrite=true") == 0
    assert len(read_rows(out)) == 5


def test_an_unfinished_output_of_other_prompts_is_refused(
    capsys: pytest.CaptureFixture[str], prompts: Path, limit: Callable[[int], None], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    limit(1)
    with pytest.raises(RuntimeError):
        execute(f"input.path={prompts}", f"output.path={out}")
    prompts.write_text(prompts.read_text().replace("[1, 3", "[1, 4"))
    assert "got other prompts" in refused(capsys, f"input.path={prompts}", f"output.path={out}")


def test_command_decodes_the_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["input.prompt=Sort the list: oak, fern, duck.", "decode.gen_length=32", "decode.steps=32"]
    command = [sys.executable, "-m", "decode.run", "--config=configs/vanilla.py", f"--config.output.path={out}"]
    command += [f"--config.{flag}" for flag in flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "end of text: 0 <|endoftext|>, 5 <|eot_id|>\n")
    assert read_rows(out)[0]["text"] == "duck, fern, oak."
    assert "tokens per forward" in done.stdout


def test_command_prints_lines_on_stdout_and_the_summary_on_stderr() -> None:
    command = [sys.executable, "-m", "decode.run", "--config.decode.gen_length=32", "--config.decode.steps=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 8
    ends, summary = done.stderr.split("\n", 1)
    assert ends == "end of text: 0 <|endoftext|>, 5 <|eot_id|>"
    assert summary.startswith("8 samples: ")


def test_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "decode.run", "--config.model.path=/no/such/model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: model.path: ")


def test_a_page_of_a_run(
    capsys: pytest.CaptureFixture[str], prompts: Path, limit: Callable[[int], None], tmp_path: Path
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "out.jsonl"
    assert execute(f"input.path={prompts}", f"output.view={page}") == 0
    assert all("pieces" not in json.loads(line) for line in capsys.readouterr().out.splitlines())
    content = page.read_text()
    assert all(f'"id":"p{i}"' in content for i in range(len(WORDS)))
    page.unlink()
    assert execute(f"input.path={prompts}", f"output.path={out}", "output.trace=true") == 0
    limit(0)
    assert execute(f"input.path={prompts}", f"output.path={out}", f"output.view={page}") == 0  # nothing is decoded
    assert page.read_text() == content
    assert "expected a place apart from output.path" in refused(capsys, f"output.path={out}", f"output.view={out}")
    assert "output.view: expected a file" in refused(capsys, f"output.view={tmp_path / 'none' / 'x.html'}")
