"""The lines of a file that may be longer than memory: where each one lies is held, not what it says."""

import gzip
import os
import shutil
import stat
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from typing import IO, cast

from dllm_jax import remote
from dllm_jax.errors import UsageError

_GZIP = b"\x1f\x8b"  # how such a file begins


class Lines:
    """Lines by their place among those that are kept, read again whenever they are asked for.

    Args:
        file: can seek, and stays as it is.
        name: of the file, for errors.
        field: the setting that it comes from, likewise.
    """

    def __init__(self, file: IO[bytes], *, name: str, field: str) -> None:
        self._file, self._name, self._field = file, name, field
        self._offsets = array("Q")
        self._state = _state(file)

    def __len__(self) -> int:
        return len(self._offsets)

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, number (from 1) and content of every line that is not blank, without its end."""
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                yield offset, number, line.removesuffix(b"\n")
            offset += len(line)

    def keep(self, offset: int) -> None:
        """Adds the line that begins there."""
        self._offsets.append(offset)

    def read(self, place: int) -> bytes:
        """The content of a kept line, without its end.

        Raises:
            UsageError: the file has changed.
        """
        if _state(self._file) != self._state:
            raise UsageError(f"{self._field}: expected a file that stays as it is, got {self._name!r}, which changed")
        self._file.seek(self._offsets[place])
        return self._file.readline().removesuffix(b"\n")


def _state(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def open_lines(path: str, *, field: str) -> Lines:
    """The lines of a file; what is packed, far away or a pipe is copied to a temporary file first.

    Args:
        path: of a file, gzipped or not, or a URL of one.
        field: the setting that it comes from, for errors.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return Lines(_seekable(path, field=field), name=path, field=field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{field}: expected a whole gzip file, got {path!r} ({error})") from None
    except OSError as error:
        raise UsageError(f"{field}: expected a readable file, got {path!r} ({error.strerror or error})") from None


def _seekable(path: str, *, field: str) -> IO[bytes]:
    if remote.is_remote(path):
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as its lines are read
        remote.fetch(path, file, field=field)
    else:
        file = open(path, "rb")  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file = _copied(file)
    file.seek(0)
    packed = file.read(len(_GZIP)) == _GZIP
    file.seek(0)
    return _copied(cast(IO[bytes], gzip.open(file))) if packed else file


def _copied(source: IO[bytes]) -> IO[bytes]:
    """What is left of a file, in a temporary one without a name: it is gone with this process."""
    with source:
        copy: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(source, copy, 2**20)
    copy.flush()
    return copy
