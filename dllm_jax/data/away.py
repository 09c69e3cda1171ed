"""Where an output lies: in a folder here, or at a URL, to which every file goes when it is whole.

Object stores cannot add to a file. What grows does so in a folder of this machine, and of the partial file only what it
says of finished shards goes to the URL: whoever continues the job elsewhere has these.
"""

import functools
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from dllm_jax import remote
from dllm_jax.data.outputs import digest_of, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.settings import OutputSettings

GONE, CHANGED, FOREIGN = "gone", "a file that was changed since", "a file that no job wrote"
PART_LINE = b'\n{"part": '  # how a line of a finished shard begins in a partial file


class Stored(Protocol):
    """What is known of a file that was written."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """Its digest."""


class Away:
    """The files of one output; with `base` they are at that URL, else only here.

    Args:
        path: of the output on this machine, as it was given.
        base: the URL of its folder, with a slash at the end; "" for none.
    """

    def __init__(self, path: str, base: str) -> None:
        self.path, self._base = path, base

    @classmethod
    def of(cls, output: OutputSettings, *, field: str) -> "Away":
        """What the settings name.

        Raises:
            UsageError: a URL that cannot be written.
        """
        if not remote.is_remote(output.path):
            return cls(output.path, "")
        remote.check(output.path, field=field)
        base, _, name = output.path.rpartition("/")
        if not name or base.endswith("/"):
            raise UsageError(f"{field}: expected the URL of a file, got {output.path!r}")
        folder = Path(output.spool).expanduser() / hashlib.sha256(output.path.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return cls(str(folder / PurePosixPath(name)), f"{base}/")

    def fetch(self, path: Path) -> None:
        """Brings a small file from there, or drops the one here if there is none."""
        if not self._base:
            return
        content = remote.read(self._url(path))
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, content)

    def fetch_partial(self, path: Path) -> None:
        """Brings the partial file, unless the one here is of the same run and as far."""
        content = remote.read(self._url(path)) if self._base else None
        if content is None:
            return
        mine = path.read_bytes() if path.exists() else b""  # of finished shards and the rows of one
        if mine.partition(b"\n")[0] != content.partition(b"\n")[0] or mine.count(PART_LINE) < content.count(PART_LINE):
            replace_file(path, content)

    def put(self, path: Path, *, keep: bool = False) -> None:
        """Takes a whole file there."""
        if self._base:
            remote.upload(path, self._url(path))
            if not keep:
                path.unlink()

    def put_head(self, path: Path, content: bytes) -> None:
        """Begins a partial file there: an output that cannot be written is found before the work."""
        if self._base:
            with tempfile.NamedTemporaryFile() as file:
                file.write(content)
                file.flush()
                remote.upload(Path(file.name), self._url(path))

    def remove(self, path: Path) -> None:
        """Removes a file wherever it is."""
        path.unlink(missing_ok=True)
        if self._base:
            remote.remove(self._url(path))

    def is_there(self, path: Path) -> bool:
        """Whether there is such a file."""
        return path.exists() if not self._base else remote.size(self._url(path)) is not None

    def state(self, path: Path, stored: Stored | None) -> str:
        """What is wrong with a file, "" if nothing is.

        Args:
            path: of the file.
            stored: what was written; None if nothing was.
        """
        if not self.is_there(path):
            return GONE if stored else ""
        if not stored:
            return FOREIGN
        if self._base:
            return "" if remote.size(self._url(path)) == stored.size else CHANGED
        return "" if path.stat().st_size == stored.size and digest_of(path) == stored.sha256 else CHANGED

    def opener(self, path: Path) -> Callable[[], IO[bytes]]:
        """What opens a file to be read, with a copy of it if it is not here."""
        return functools.partial(self._open, path)

    def _open(self, path: Path) -> IO[bytes]:
        if not self._base or path.exists():
            return path.open("rb")
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - who asked closes it
        remote.fetch(self._url(path), file, field="output.path")
        file.seek(0)
        return file

    def _url(self, path: Path) -> str:
        return self._base + path.name
