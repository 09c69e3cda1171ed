"""Inputs, outputs and checkpoints at URLs: fsspec's memory, and a service that fails now and then."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import tenacity
from fsspec.implementations.memory import MemoryFileSystem

from dllm_jax import remote
from dllm_jax.checkpoints import elsewhere, fingerprint
from dllm_jax.checkpoints.filters import resolve_filter
from dllm_jax.checkpoints.load import ASSETS, resolve
from dllm_jax.errors import UsageError
from tests.test_long_jobs import CutOff, Execute, FakeDecoder, asked, execute, imitated, out, whole

__all__ = ["asked", "execute", "imitated", "out", "whole"]  # fixtures
SHARDED = ("output.shard_lines=3",)


class Flaky(MemoryFileSystem):
    """Memory whose service fails before every third request, as often as `failures` says."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests = 0
    failed = 0
    error: ClassVar[Exception] = ConnectionResetError("the service is busy")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:  # of the class above only for its own protocol
        return super()._strip_protocol(str(path).removeprefix(f"{cls.protocol}:/"))

    def _request(self) -> None:
        Flaky.requests += 1
        if Flaky.requests % 3 == 1:
            Flaky.failed += 1
            raise Flaky.error

    def _open(self, *arguments: Any, **options: Any) -> Any:
        self._request()
        return super()._open(*arguments, **options)

    def info(self, *arguments: Any, **options: Any) -> Any:
        self._request()
        return super().info(*arguments, **options)


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "WAIT", tenacity.wait_none())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    elsewhere.copied.cache_clear()
    yield
    for kind in (MemoryFileSystem, Flaky):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]


def stored(kind: type[MemoryFileSystem] = MemoryFileSystem) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: file.getvalue() for path, file in sorted(kind.store.items()) if "/job/" in path}


@pytest.mark.parametrize("protocol", ["memory", "flaky"])
@pytest.mark.parametrize("settings", [(), SHARDED, (*SHARDED, "output.shards=merge")], ids=str)
def test_a_job_between_urls(
    execute: Execute,
    asked: Path,
    whole: bytes,
    tmp_path: Path,
    protocol: str,
    settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = Flaky if protocol == "flaky" else MemoryFileSystem
    given, output = f"{protocol}://bucket/in.jsonl.gz", f"{protocol}://bucket/job/out.jsonl"
    fsspec.filesystem("memory" if protocol == "memory" else "flaky")
    kind.store["/bucket/in.jsonl.gz"] = _file(gzip.compress(asked.read_bytes()))
    failed = Flaky.failed
    job = (*settings, f"input.path={given}", f"output.path={output}")
    assert execute(*job) == 0
    left = settings == SHARDED
    files = stored(kind)
    assert list(files) == sorted([*(_shards() if left else ["out.jsonl"]), "out.jsonl.metrics.json"])
    assert b"".join(content for name, content in files.items() if name.endswith("l")) == whole
    assert (Flaky.failed > failed) == (protocol == "flaky")
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and "outputs" in str(path)]
    capsys.readouterr()
    assert execute(*job) == 0
    assert capsys.readouterr().err == f"finished already: {output}\n"
    assert execute(*job, "decode.seed=3") == 2
    assert "got decode.seed 0 instead of 3" in capsys.readouterr().err


@pytest.mark.parametrize("machine", ["the same", "another"])
def test_what_survives_of_a_job_at_a_url(
    execute: Execute, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    def cut(number: int) -> None:
        if number == 3:  # the second of the second file
            raise CutOff

    job = (*SHARDED, "output.path=memory://bucket/job/out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(FakeDecoder, "before", staticmethod(cut))
        with pytest.raises(CutOff):
            execute(*job)
    assert list(stored()) == [_shards()[0], "out.jsonl.partial"]
    if machine == "another":
        shutil.rmtree(tmp_path / "home")
    assert execute(*job) == 0
    assert FakeDecoder.batches_done == (5 if machine == "the same" else 6)  # a finished shard is everywhere
    assert list(stored()) == [*_shards(), "out.jsonl.metrics.json"]
    assert b"".join(stored()[name] for name in _shards()) == whole


def test_bad_lines_go_along(execute: Execute, asked: Path) -> None:
    asked.write_text(f"oops\n{asked.read_text()}")
    assert execute("output.path=memory://bucket/job/out.jsonl", "input.on_error=skip") == 0
    assert json.loads(stored()["out.jsonl.errors.jsonl"])["line"] == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("input.path=memory://none.jsonl", "error: input.path: expected a readable file, got 'memory://none.jsonl'"),
        ("input.path=nothing://in.jsonl", "error: input.path: expected a path or a URL like gs://, s3://, got "),
        ("output.path=nothing://out.jsonl", "error: output.path: expected a path or a URL like gs://, s3://, got "),
        ("output.path=memory://bucket/", "error: output.path: expected the URL of a file, got "),
        ("model.path=memory://none", "error: model.path: expected a folder or file, got 'memory://none', where"),
    ],
)
def test_urls_that_are_refused(execute: Execute, capsys: pytest.CaptureFixture[str], settings: str, told: str) -> None:
    assert execute(settings) == 2
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(("protocol", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
@pytest.mark.parametrize("setting", ["input.path", "output.path", "model.path"])
def test_a_missing_extra_is_named(
    execute: Execute,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    package: str,
    extra: str,
    setting: str,
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"Please install {package}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    assert execute(f"{setting}={protocol}://bucket/x.jsonl") == 2
    err, url = capsys.readouterr().err, f"{protocol}://bucket/x.jsonl"
    assert err == f"error: {setting}: for {url!r} expected pip install 'dllm_jax[{extra}]', got no {package}\n"


def test_a_service_that_stays_away_is_told_in_one_line(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Flaky, "info", lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("quota 7")))
    monkeypatch.setattr(Flaky, "_open", Flaky.info)
    monkeypatch.setattr(Flaky, "cat_file", Flaky.info)
    assert execute("output.path=flaky://bucket/out.jsonl") == 1
    assert capsys.readouterr().err == "error: flaky://bucket/out.jsonl.partial: quota 7\n"


def test_checkpoints_are_copied_once(execute: Execute, whole: bytes, tmp_path: Path) -> None:
    model = ASSETS / "llada-tiny"
    for file in (*model.iterdir(), *(ASSETS / "filter-tiny").iterdir()):
        Flaky.store[f"/bucket/{file.parent.name}/{file.name}"] = _file(file.read_bytes())
    Flaky.pseudo_dirs += ["/bucket", "/bucket/llada-tiny", "/bucket/filter-tiny"]
    folder = resolve("flaky://bucket/llada-tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    marks = fingerprint.fingerprint({"model.path": folder})
    before = (folder / "config.json").stat().st_mtime_ns
    (folder / "tokenizer.json").unlink()
    elsewhere.copied.cache_clear()
    assert resolve("flaky://bucket/llada-tiny/") == folder  # whole: not looked at again
    assert (folder / "config.json").stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "home")
    elsewhere.copied.cache_clear()
    assert fingerprint.fingerprint({"model.path": resolve("flaky://bucket/llada-tiny")}) == marks
    Flaky.store["/bucket/llada-tiny/config.json"] = _file(b"{ }")
    elsewhere.copied.cache_clear()
    changed = resolve("flaky://bucket/llada-tiny")
    assert changed != folder
    assert (changed / "config.json").read_bytes() == b"{ }"
    filters = resolve_filter("flaky://bucket/filter-tiny")
    assert (filters / "filter.safetensors").read_bytes() == (ASSETS / "filter-tiny/filter.safetensors").read_bytes()
    one = resolve_filter("flaky://bucket/filter-tiny/filter.safetensors")
    assert one.is_file()
    with pytest.raises(UsageError, match="where nothing is"):
        resolve("flaky://bucket/none")


def test_a_job_with_its_model_at_a_url(execute: Execute, out: Path, whole: bytes) -> None:
    for file in (ASSETS / "llada-tiny").iterdir():
        MemoryFileSystem.store[f"/bucket/llada-tiny/{file.name}"] = _file(file.read_bytes())
    assert execute("model.path=memory://bucket/llada-tiny") == 0
    assert out.read_bytes() == whole


def _shards() -> list[str]:
    return [f"out-{number:05d}-of-00003.jsonl" for number in range(3)]


def _file(content: bytes) -> Any:
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(MemoryFileSystem(), "/x", content)
