"""Jobs and files: who made a row, one writer, finished is finished, faults of the machine."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax import cli, memory, opening
from dllm_jax.checkpoints import convert, fingerprint
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.config import Config
from dllm_jax.identity import sources
from dllm_jax.settings import DecodeSettings, FilterSettings, ModelSettings, TokenizerSettings, VerifierSettings
from tests.cases.conftest import ROOT, Run

SHORT = ("decode.gen_length=8", "decode.block_length=8", "decode.batch_size=2", "mesh.data=1")
LOCK = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"


@pytest.fixture
def model(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "llada", tmp_path / "model"))


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Four prompts, two batches."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt_ids": [5, 6, 7 + i]}) + "\n" for i in range(4)))
    return path


@pytest.fixture
def settings(model: Path, asked: Path, tmp_path: Path) -> tuple[str, ...]:
    """Of a small job that writes to out.jsonl."""
    return (*SHORT, f"model.path={model}", f"input.path={asked}", f"output.path={tmp_path / 'out.jsonl'}")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded."""
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))


def metrics_of(out: Path) -> Path:
    return out.with_name(out.name + ".metrics.json")


def cut_off(out: Path, *, rows: int) -> None:
    """Puts a finished job back to where it had decoded so many rows."""
    identity = json.loads(metrics_of(out).read_text())["identity"]
    lines = [{"index": i, **json.loads(line)} for i, line in enumerate(out.read_text().splitlines()[:rows])]
    out.with_name(out.name + ".partial").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (identity, *lines))
    )
    out.unlink()
    metrics_of(out).unlink()


def swap_rows(file: Path) -> None:
    """Exchanges two rows of the head; size and time of the file stay."""
    stat, tensors = file.stat(), load_file(file)
    name = next(name for name in tensors if name.endswith("ff_out.weight"))
    tensors[name][[3, 4]] = tensors[name][[4, 3]]
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets every longer write fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_finished_job_says_so_and_costs_nothing(
    run: Run, settings: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(*settings)
    written = out.read_bytes(), metrics_of(out).read_bytes()
    assert first.code == 0
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    again = run(*settings, "output.overwrite=true", "model.verify=false")
    assert (again.code, again.out) == (0, first.out)
    assert again.err == f"finished already: {out}\n"
    assert (out.read_bytes(), metrics_of(out).read_bytes()) == written
    assert "got decode.seed 0 instead of 1 (output.overwrite=true replaces it)" in run(*settings, "decode.seed=1").error
    scored = run(*settings, f"input.path={ASSETS / 'tasks.jsonl'}", command="eval")
    assert "got command 'decode.run' instead of 'decode.eval'" in scored.error
    monkeypatch.undo()
    assert run(*settings, "decode.seed=1", "output.overwrite=true").code == 0
    assert json.loads(metrics_of(out).read_text())["identity"]["decode"]["seed"] == 1


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("there", [("out.jsonl",), ("out.jsonl.metrics.json",), ("out.jsonl.partial",)])
def test_files_that_no_job_wrote_are_refused(
    run: Run, settings: tuple[str, ...], tmp_path: Path, there: tuple[str, ...]
) -> None:
    for name in there:
        (tmp_path / name).write_text('{"precious": 1}\n')
    assert "got a file that no job" in run(*settings).error
    assert all((tmp_path / name).read_text() == '{"precious": 1}\n' for name in there)


def test_an_output_that_was_changed_is_no_longer_taken_for_finished(
    run: Run, settings: tuple[str, ...], out: Path
) -> None:
    assert run(*settings).code == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    assert "got a file that was changed since" in run(*settings).error
    assert run(*settings, "output.overwrite=true").code == 0
    assert out.read_bytes() == whole


def test_a_job_cut_off_while_it_finishes_ends_the_same(run: Run, settings: tuple[str, ...], out: Path) -> None:
    assert run(*settings).code == 0
    whole = out.read_bytes()
    cut_off(out, rows=4)
    out.write_bytes(whole)  # cut off between the output and its metrics
    assert run(*settings).code == 0
    assert out.read_bytes() == whole
    assert metrics_of(out).exists()


def test_failed_rows_fail_again(
    run: Run, checkpoints: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = (*settings, f"model.path={checkpoints / 'llada-nan'}")
    first = run(*nan)
    monkeypatch.setattr(opening, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    again = run(*nan)
    assert first.code == again.code == 1
    assert first.err.splitlines()[-1] == again.err.splitlines()[-1]
    assert "rows ended with finish_reason error" in again.err


def test_other_weights_at_the_same_path(
    run: Run, settings: tuple[str, ...], model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*settings).code == 0
    swap_rows(model / "model.safetensors")
    told = "got another model.safetensors of model.path (output.overwrite=true"
    with monkeypatch.context() as patch:
        patch.setattr(opening, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
        assert told in run(*settings).error  # finished
        cut_off(out, rows=2)
        assert told in run(*settings).error  # unfinished
    assert run(*settings, "output.overwrite=true").code == 0


@pytest.mark.usefixtures("nothing_loads")
def test_another_version_of_the_package(run: Run, settings: tuple[str, ...], out: Path) -> None:
    identity = {"dllm_jax": "0.0.1"}
    metrics_of(out).write_text(json.dumps({"identity": identity}))
    assert "got dllm_jax '0.0.1' instead of " in run(*settings).error


@pytest.mark.parametrize(
    ("field", "bundled", "file"),
    [
        ("model.path", "llada-tiny", "config.json"),
        ("model.path", "llada-tiny", "tokenizer.json"),
        ("tokenizer.path", "llada-tiny", "tokenizer.json"),
        ("verifier.path", "verifier-tiny", "model.safetensors"),
        ("filter.path", "filter-tiny", "filter.safetensors"),
    ],
)
def test_every_file_that_is_read_counts(tmp_path: Path, field: str, bundled: str, file: str) -> None:
    folder = shutil.copytree(ASSETS / bundled, tmp_path / "copy")
    policy = {"verifier.path": "apd", "filter.path": "learn2pd"}.get(field, "low_confidence")
    config = Config(
        model=ModelSettings(path=str(folder) if field == "model.path" else "llada-tiny"),
        tokenizer=TokenizerSettings(path=str(folder) if field == "tokenizer.path" else ""),
        verifier=VerifierSettings(path=str(folder) if field == "verifier.path" else "verifier-tiny"),
        filter=FilterSettings(path=str(folder) if field == "filter.path" else "filter-tiny"),
        decode=DecodeSettings(policy=policy),
    )
    before = fingerprint.fingerprint(sources(config))
    (folder / "README.md").write_text("not read")
    assert fingerprint.fingerprint(sources(config)) == before
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)
    after = fingerprint.fingerprint(sources(config))
    assert {name for name in before if before[name] != after[name]} == {f"{file} of {field}"}


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 100)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 10)
    file = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).bytes(100_000)

    def digest(content: bytes, *, mtime: int = 10**9) -> str:
        file.write_bytes(content)
        os.utime(file, ns=(mtime, mtime))
        return fingerprint.fingerprint({"model.path": tmp_path})["model.safetensors of model.path"]

    first = digest(content)
    assert digest(content) == first
    for place in (50, 99_995):
        assert digest(content[:place] + b"#" + content[place + 1 :]) != first
    assert digest(content + b"#") != first
    assert digest(content, mtime=10**9 + 1) != first


def test_a_converted_folder_stands_in_its_manifest(checkpoints: Path, tmp_path: Path) -> None:
    convert.convert(checkpoints / "llada", tmp_path / "converted", to="orbax", dtype="keep", overwrite=False)
    names = set(fingerprint.fingerprint({"model.path": tmp_path / "converted"}))
    assert {"manifest.json of model.path", "config.json of model.path"} <= names
    assert not any("params" in name for name in names)


@pytest.mark.usefixtures("nothing_loads")
def test_a_second_job_on_one_output_is_refused(
    run: Run, settings: tuple[str, ...], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.jsonl").symlink_to(out)
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, f"{out}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        other.stdout.readline()  # it has the lock
        for name in ("out.jsonl", "link.jsonl"):
            line = run(*settings, f"output.path={tmp_path / name}", "decode.temperature=1.0").error
            assert f"output.path: expected no other job that writes {out}, got one that is running" in line
        other.send_signal(signal.SIGKILL)
    assert Path(f"{out}.lock").exists()  # what is left of a killed job holds nobody up
    assert "model.path: expected a folder or one of" in run(*settings, "model.path=/no/such").error
    monkeypatch.undo()
    assert run(*settings).code == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.metrics.json"]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("suffix", ["", ".partial", ".metrics.json", ".tmp", ".metrics.json.tmp", ".lock"])
@pytest.mark.parametrize("how", ["the same file", "a hard link", "a symlink"])
def test_names_that_are_written_are_none_that_are_read(
    run: Run, settings: tuple[str, ...], asked: Path, out: Path, suffix: str, how: str
) -> None:
    name, content = Path(f"{out}{suffix}"), asked.read_bytes()
    if how == "a symlink":
        asked.rename(name)
        asked.symlink_to(name)
    else:
        os.link(asked, name)
    given = (f"input.path={name}",) if how == "the same file" else ()
    assert "output.path: expected a place apart from input.path, got " in run(*settings, *given).error
    assert name.read_bytes() == content


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.jsonl", "manifest.json"])
def test_files_of_the_model_are_no_output(run: Run, settings: tuple[str, ...], model: Path, name: str) -> None:
    line = run(*settings, f"output.path={model / name}", "output.overwrite=true").error
    assert "output.path: expected a place apart from model.path, got " in line


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("suffix", ["", ".partial", ".metrics.json", ".tmp", ".lock"])
def test_folders_in_the_place_of_files(run: Run, settings: tuple[str, ...], out: Path, suffix: str) -> None:
    Path(f"{out}{suffix}").mkdir()
    assert f"(out.jsonl{suffix} is a folder)" in run(*settings).error


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a" * 240, "a name of more than 255 bytes with what is added to it"),
        ("ä" * 120, "a name of more than 255 bytes with what is added to it"),
        ("a" * 300, "a name of more than 255 bytes"),
        ("in.jsonl/out.jsonl", "no folder "),
        ("none/out.jsonl", "no folder "),
        ("loop", "loop"),
        ("a/" * 3000, "File name too long"),
        ("/dev/null", "null is a device or pipe"),
    ],
)
def test_places_where_nothing_can_be_written(
    run: Run, settings: tuple[str, ...], tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert told in run(*settings, f"output.path={tmp_path / name}").error


def test_a_full_disk_and_the_same_bytes_after_it(run: Run, settings: tuple[str, ...], out: Path) -> None:
    assert run(*settings).code == 0
    whole, partial = out.read_bytes(), out.with_name("out.jsonl.partial")
    cut_off(out, rows=2)
    size = partial.stat().st_size
    partial.unlink()
    with files_of_at_most(size + 100):  # the second batch is torn
        full = run(*settings)
    assert full.code == 1
    assert full.err.splitlines()[-1] == f"error: {partial}: {os.strerror(errno.EFBIG)}"
    assert partial.stat().st_size == size + 100
    assert not out.exists()
    with files_of_at_most(len(whole) - 1):  # less than the output as a whole
        full = run(*settings)
    assert full.code == 1
    assert run(*settings).code == 0
    assert out.read_bytes() == whole


def test_no_room_for_the_output_as_a_whole(run: Run, settings: tuple[str, ...], out: Path) -> None:
    assert run(*settings).code == 0
    whole = out.read_bytes()
    cut_off(out, rows=4)
    with files_of_at_most(len(whole) - 1):
        full = run(*settings)
    assert (full.code, full.err.splitlines()[-1]) == (1, f"error: {out}.tmp: {os.strerror(errno.EFBIG)}")
    assert sorted(path.name for path in out.parent.glob("out*")) == ["out.jsonl.partial"]
    assert run(*settings).code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("to", convert.TARGETS)
@pytest.mark.parametrize("limit", ["free space", "size of files"])
def test_convert_without_room_leaves_nothing(
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    limit: str,
) -> None:
    target = tmp_path / "target"
    arguments = ["convert", f"--source={checkpoints / 'llada'}", f"--target={target}", f"--to={to}"]
    if limit == "free space":
        usage = namedtuple("usage", "total used free")(2**20, 2**20 - 1000, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert convert.main(arguments) == 1
        told = "bytes needed, 1,000 there)"
    else:
        with files_of_at_most(10_000):
            assert convert.main(arguments) == 1
        told = os.strerror(errno.EFBIG)
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith(f"error: {target}.partial-")) == (1, True), err
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_ours_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        def body() -> None:
            raise error

        return cli.guarded(body)

    with pytest.raises(OSError, match="Invalid argument"):
        fail(OSError(errno.EINVAL, "Invalid argument"))
    with pytest.raises(ValueError, match="a bug"):
        fail(ValueError("a bug"))
    assert fail(FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.json")) == 1
    assert fail(OSError(errno.ENOSPC, "No space left on device")) == 1
    assert fail(MemoryError("Unable to allocate 3 TiB")) == 1
    assert [line[:20] for line in capsys.readouterr().err.splitlines()] == [
        "error: gone.json: No",
        "error: a file or the",
        "error: out of memory",
    ]


@pytest.mark.parametrize(
    ("room", "given", "told"),
    [
        (2**40, "decode.batch_size=10000000000", "decode.batch_size: expected what fits into memory, got 10000000000"),
        (10**6, "decode.batch_size=256", "decode.batch_size: expected what fits into memory, got 256, which needs "),
        (10**3, "decode.batch_size=2", "model.path: expected what fits into memory, got "),
        (10**9, "model.preset=llada_8b", "model.preset: expected what fits into memory, got 'llada_8b', which needs "),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    run: Run, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, room: int, given: str, told: str
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda mesh: room)
    ran = run(*settings, given)
    assert ran.code == 2
    line = ran.err.splitlines()[-1]
    assert line.startswith(f"error: {told}")
    assert line.endswith(f"bytes on every device ({room:,} are free)")


@pytest.mark.parametrize(
    ("refill", "program", "call"),
    [("0", "generate.Decoder.program", "generate.decode"), ("0.25", "streaming.refill_program", "streaming.refill")],
)
def test_a_failed_allocation_is_told_in_one_line(
    run: Run, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, refill: str, program: str, call: str
) -> None:
    def fail(*args: object) -> None:
        raise memory.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand a page")

    monkeypatch.setattr(f"dllm_jax.decoding.{call}", fail)
    monkeypatch.setattr(f"dllm_jax.decoding.{program}", lambda *args, **kwargs: None)
    ran = run(*settings, f"decode.refill={refill}")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].endswith("got 2: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def test_the_memory_of_this_machine_is_known() -> None:
    mesh = memory.jax.make_mesh((1,), ("data",))
    there = memory.available_bytes(mesh)
    assert there is not None
    assert 10**6 < there < 10**15


@pytest.mark.slow
def test_killed_jobs_mix_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """Two jobs with one output at once, the first killed: the second refused, the first continued to the same bytes."""
    asked = tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps({"prompt_ids": [5, 6, 7 + i]}) + "\n" for i in range(20)))
    base = [f"--config.{flag}" for flag in (f"model.path={checkpoints / 'llada'}", f"input.path={asked}")]

    def command(out: Path, *flags: str) -> list[str]:
        given = [f"--config.{flag}" for flag in ("decode.batch_size=2", f"output.path={out}", *flags)]
        return [sys.executable, "-m", "decode.run", *base, *given]

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
    partial = Path(f"{out}.partial")
    with subprocess.Popen(command(out), cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        while not partial.exists() or partial.read_bytes().count(b"\n") < 3:  # what it is, and two lines
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(command(out, "decode.temperature=1.0"), cwd=ROOT, capture_output=True, text=True)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert "expected no other job that writes" in second.stderr
        first.kill()
    assert not out.exists()
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == whole.read_bytes()
