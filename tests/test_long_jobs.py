"""Long jobs: files of some lines each, cut off anywhere, SIGTERM, bad lines, flat memory. Decoding is imitated."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from decode import eval as evaluation
from decode import run as decode_run
from dllm_jax import cli, jobs, kept, opening
from dllm_jax.checkpoints.load import load_model
from dllm_jax.data import results
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult, Timing

ROOT = Path(__file__).parents[1]
LENGTH = 4  # generated tokens
Execute = Callable[..., int]


class CutOff(BaseException):
    """Instead of kill -9."""


class FakeDecoder(Decoder):
    """Gives tokens that depend on prompt and row alone; calls `before` with the number of every batch."""

    before: Callable[[int], object] = staticmethod(lambda batch: None)
    batches_done = 0

    def __call__(self, prompts: Sequence[Sequence[int]], *, rows: Sequence[int] | None = None) -> DecodeResult:
        FakeDecoder.before(FakeDecoder.batches_done)
        FakeDecoder.batches_done += 1
        size = len(prompts)
        asked = zip(prompts, rows or (), strict=True)
        tokens_BG = np.array([[7 + (sum(p) + r + i) % 60 for i in range(LENGTH)] for p, r in asked])
        full_B = np.full(size, LENGTH, np.int32)
        return DecodeResult(
            tokens_BG=tokens_BG,
            nfe_B=full_B,
            commit_step_BG=np.tile(np.arange(1, LENGTH + 1), (size, 1)),
            confidence_BG=np.ones((size, LENGTH)),
            end_B=full_B,
            text_end_B=full_B,
            num_tokens_B=full_B,
            masks_left_B=np.zeros(size, np.int32),
            finish_reason=("length",) * size,
            iterations=LENGTH,
            columns=LENGTH * 32,
            timing=Timing(0.0, 1.0, 0, 0),
            mask_id=self.mask_id,
        )


@pytest.fixture(autouse=True)
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(opening, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    monkeypatch.setattr(kept, "open_model", lambda *a: loaded[0] if loaded else opening.open_model(*a))
    monkeypatch.setattr(jobs, "Decoder", FakeDecoder)
    monkeypatch.setattr(FakeDecoder, "before", staticmethod(lambda batch: None))
    monkeypatch.setattr(FakeDecoder, "batches_done", 0)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Seven prompts of different lengths: four batches, or five in three files of three lines."""
    path = tmp_path / "in.jsonl"
    lines = [{"id": f"p{i}", "prompt_ids": [5, 6, *[7 + i] * (9 - i)]} for i in range(7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def execute(asked: Path, tmp_path: Path) -> Execute:
    """Call it with settings of a small job that writes to out/out.jsonl."""
    (tmp_path / "out").mkdir()

    def call(*settings: str, main: Callable[..., int] = decode_run.main) -> int:
        base = [
            "mesh.data=1",
            f"decode.gen_length={LENGTH}",
            "decode.batch_size=2",
            "decode.refill=0",
            f"input.path={asked}",
        ]
        base += [f"output.path={tmp_path / 'out' / 'out.jsonl'}", *settings]
        argv = ["run", *(f"--config.{setting}" for setting in base)]
        return cli.execute(main, argv, description="", default_config=str(ROOT / "configs" / "vanilla.py"))

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "out.jsonl"


@pytest.fixture
def whole(execute: Execute, out: Path) -> bytes:
    """The output of the job in one file, which is gone."""
    assert execute() == 0
    content = out.read_bytes()
    assert [json.loads(line)["id"] for line in content.splitlines()] == [f"p{i}" for i in range(7)]
    for path in out.parent.iterdir():
        path.unlink()
    FakeDecoder.batches_done = 0
    return content


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics_of(out: Path) -> dict:
    return json.loads(out.with_name(out.name + ".metrics.json").read_text())


SHARDS = [f"out-{number:05d}-of-00003.jsonl" for number in range(3)]


def test_an_output_in_files_of_three_lines(
    execute: Execute, out: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute("output.shard_lines=3") == 0
    assert names(out.parent) == [*SHARDS, "out.jsonl.metrics.json"]
    contents = [(out.parent / name).read_bytes() for name in SHARDS]
    assert [content.count(b"\n") for content in contents] == [3, 3, 1]
    assert b"".join(contents) == whole
    metrics = metrics_of(out)
    assert (metrics["num_samples"], metrics["nfe_sum"], metrics["timed_samples"]) == (7, 7 * LENGTH, 7)
    assert FakeDecoder.batches_done == 5  # batches are made inside a file
    capsys.readouterr()
    assert execute("output.shard_lines=3") == 0
    assert capsys.readouterr().err == f"finished already: {out}\n"
    assert execute("output.shard_lines=2") == 2
    assert "got output.shard_lines 3 instead of 2" in capsys.readouterr().err
    (out.parent / SHARDS[1]).write_text("changed\n")
    assert execute("output.shard_lines=3") == 2
    assert "got a file that was changed since" in capsys.readouterr().err
    assert execute("output.shard_lines=3", "output.overwrite=true") == 0
    assert b"".join((out.parent / name).read_bytes() for name in SHARDS) == whole
    done = FakeDecoder.batches_done
    assert execute("output.shard_lines=3", "output.shards=merge") == 0  # what is finished is merged without decoding
    assert FakeDecoder.batches_done == done
    assert names(out.parent) == ["out.jsonl", "out.jsonl.metrics.json"]
    assert out.read_bytes() == whole


def test_too_many_files(execute: Execute, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(results, "MOST_SHARDS", 3)
    assert execute("output.shard_lines=2") == 2
    told = "error: output.shard_lines: expected at least 3 for 7 lines (at most 3 files), got 2"
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_files_of_others_are_no_shards(
    execute: Execute, out: Path, whole: bytes, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out.parent / SHARDS[2]).write_text("precious\n")
    assert execute("output.shard_lines=3") == 2
    assert f"expected {SHARDS[2]} to be what this job writes, got a file that no job wrote" in capsys.readouterr().err
    asked.rename(out.parent / SHARDS[1])
    given = f"input.path={out.parent / SHARDS[1]}"
    assert execute("output.shard_lines=3", "output.overwrite=true", given) == 2
    assert "output.path: expected a place apart from input.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [(), ("output.shard_lines=3",), ("output.shard_lines=3", "output.shards=merge")], ids=str
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_cut_off_at_any_change_of_a_file_it_ends_the_same(
    execute: Execute,
    out: Path,
    whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    moment: str,
) -> None:
    """Every rename and removal in turn is the last thing that a process does, or the first that it does not."""
    for last in itertools.count():
        with monkeypatch.context() as patch:
            steps = itertools.count()
            for module, name in ((os, "replace"), (Path, "unlink")):
                patch.setattr(module, name, cutting(getattr(module, name), steps, last=last, moment=moment))
            try:
                assert execute(*settings) == 0
                break
            except CutOff:
                pass
        assert execute(*settings) == 0
        left = "merge" not in str(settings) and bool(settings)
        assert names(out.parent) == [*(SHARDS if left else ["out.jsonl"]), "out.jsonl.metrics.json"]
        files = [out.parent / name for name in SHARDS] if left else [out]
        assert b"".join(path.read_bytes() for path in files) == whole
        assert FakeDecoder.batches_done == (5 if settings else 4)  # none twice
        assert metrics_of(out)["num_samples"] == 7
        for path in out.parent.iterdir():
            path.unlink()
        FakeDecoder.batches_done = 0
    assert last > 3


def cutting(change: Callable[..., object], steps: Iterator[int], *, last: int, moment: str) -> Callable[..., object]:
    def cut(*arguments: object, **options: object) -> object:
        # The lock goes however the process ends; and before all batches are decoded another test cuts.
        counted = ".lock" not in str(arguments[0]) and "dllm_jax-" not in str(arguments[0])
        number = next(steps) if counted else -1
        if number == last and moment == "before":
            raise CutOff
        done = change(*arguments, **options)
        if number == last:
            raise CutOff
        return done

    return cut


@pytest.mark.parametrize("batch", range(5))
def test_cut_off_between_batches_of_shards_nothing_is_done_twice(
    execute: Execute, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    def cut(number: int) -> None:
        if number == batch:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(FakeDecoder, "before", staticmethod(cut))
        with pytest.raises(CutOff):
            execute("output.shard_lines=3")
    finished = [name for name in names(out.parent) if name in SHARDS]
    assert finished == SHARDS[: batch // 2]  # two batches each
    assert execute("output.shard_lines=3") == 0
    assert FakeDecoder.batches_done == 5
    assert b"".join((out.parent / name).read_bytes() for name in SHARDS) == whole
    assert metrics_of(out)["num_samples"] == 7


def test_a_finished_shard_that_is_gone_is_decoded_again(
    execute: Execute, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(number: int) -> None:
        if number == 3:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(FakeDecoder, "before", staticmethod(cut))
        with pytest.raises(CutOff):
            execute("output.shard_lines=3")
    (out.parent / SHARDS[0]).unlink()
    assert execute("output.shard_lines=3", "output.shards=merge") == 0
    assert out.read_bytes() == whole


@pytest.fixture
def default_signal() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("default_signal")
@pytest.mark.parametrize("settings", [(), ("output.shard_lines=3",)], ids=str)
def test_sigterm_ends_behind_the_batch_and_says_how_to_go_on(
    execute: Execute,
    out: Path,
    whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, ...],
) -> None:
    def end(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(FakeDecoder, "before", staticmethod(end))
        assert execute(*settings) == 0
    done = 3 if settings else 4
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"stopped: {done} of 7 lines are done; start the same command again to go on"
    assert len(told) == 2  # and the end tokens
    assert FakeDecoder.batches_done == 2
    os.kill(os.getpid(), signal.SIGTERM)  # while the process ends
    assert execute(*settings) == 0
    assert FakeDecoder.batches_done == 5 if settings else 4
    assert b"".join(path.read_bytes() for path in sorted(out.parent.glob("out*.jsonl"))) == whole


@pytest.mark.usefixtures("default_signal")
def test_sigterm_ends_an_evaluation_too(
    execute: Execute, asked: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt_ids": [5, 6, i], "task": "copy", "answer": "oak"} for i in range(6)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with monkeypatch.context() as patch:
        patch.setattr(FakeDecoder, "before", staticmethod(lambda number: os.kill(os.getpid(), signal.SIGTERM)))
        assert execute(main=evaluation.main) == 0
    assert "stopped: 2 of 6 lines are done" in capsys.readouterr().err
    assert execute(main=evaluation.main) == 0
    metrics = metrics_of(out)
    assert (metrics["num_samples"], metrics["accuracy"], metrics["num_samples_by_task"]) == (6, 0.0, {"copy": 6})
    assert all(json.loads(line)["correct"] is False for line in out.read_text().splitlines())


def test_bad_lines_are_listed(execute: Execute, asked: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = out.with_name("out.jsonl.errors.jsonl")
    good = asked.read_bytes().splitlines()
    asked.write_bytes(b"\n".join([*good[:2], b'{"prompt_ids": [9999]}', b"", b"caf\xe9", *good[2:]]))
    assert execute("input.on_error=skip") == 0
    assert [json.loads(line) for line in errors.read_text().splitlines()] == [
        {
            "line": 3,
            "error": "prompt: expected token ids from 0 to 511, got 9999",
            "text": '{"prompt_ids": [9999]}',
        },
        {"line": 5, "error": "expected UTF-8 text, got unexpected end of data", "text": "caf\\xe9"},
    ]
    assert (metrics_of(out)["num_bad_lines"], metrics_of(out)["num_samples"]) == (2, 7)
    assert len(out.read_bytes().splitlines()) == 7
    asked.write_bytes(b"\n".join(good))
    assert execute("input.on_error=skip", "output.overwrite=true") == 0
    assert not errors.exists()


def test_an_input_that_changes_while_it_is_decoded(
    execute: Execute, asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeDecoder, "before", staticmethod(lambda number: asked.write_text("{}")))
    assert execute() == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: input.path: expected a file that stays as it is, got '{asked}', which changed"


def test_a_pipe_is_read_once(execute: Execute, asked: Path, out: Path, whole: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, asked.read_bytes())
    os.close(writing)
    assert execute(f"input.path=/dev/fd/{reading}") == 0
    os.close(reading)
    assert out.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("output.shard_lines=5000", "output.shards=merge")], ids=str)
def test_memory_grows_by_some_numbers_a_line(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """At the peak, of a process of its own; a line takes 200 bytes in the input, 240 in the output, more in Python."""
    peaks = {}
    for count in (10_000, 50_000):
        path = tmp_path / "in.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"id": i, "prompt_ids": [7 + i % 50] * (20 + i % 40)}) + "\n")
        out = tmp_path / f"{count}.jsonl"
        given = (f"input.path={path}", f"output.path={out}", "decode.batch_size=32", *settings)
        code = f"from tests.test_long_jobs import measure; measure({given!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.splitlines()[-1])
        assert metrics_of(out)["num_samples"] == count
    grown = (peaks[50_000] - peaks[10_000]) / 40_000
    print(f"{grown:.0f} bytes a line; peaks {peaks}")
    assert grown < 200


def measure(settings: Sequence[str]) -> None:
    """Runs a job with imitated decoding and prints the most bytes that the process had in memory."""
    jobs.Decoder = FakeDecoder  # type: ignore[misc]
    given = ("mesh.data=1", "decode.refill=0", f"decode.gen_length={LENGTH}", *settings)
    argv = ["run", *(f"--config.{setting}" for setting in given)]
    config = str(ROOT / "configs" / "vanilla.py")
    assert cli.execute(decode_run.main, argv, description="", default_config=config) == 0
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
