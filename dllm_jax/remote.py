"""Files elsewhere, by URL (gs://, s3://, whatever fsspec knows): fetched and uploaded whole, with further tries.

A file appears under its name when it is whole: that is what object stores do, and all that is asked of them here.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import fsspec
import tenacity

from dllm_jax.errors import UsageError

T = TypeVar("T")
EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
TRIES = 6
WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=20)  # seconds between them
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return isinstance(path, str) and "://" in path


def check(url: str, *, field: str) -> None:
    """Refuses a URL of a kind that cannot be read here.

    Args:
        url: of a file or folder.
        field: the setting that it comes from, for the error.

    Raises:
        UsageError: naming the extra to install, or that there is none.
    """
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package, extra = EXTRAS.get(protocol, ("", ""))
        wanted = f"pip install 'dllm_jax[{extra}]', got no {package}" if extra else f"its packages, got: {error}"
        raise UsageError(f"{field}: for {url!r} expected {wanted}") from None
    except ValueError:
        raise UsageError(f"{field}: expected a path or a URL like gs://, s3://, got {url!r}") from None


def fetch(url: str, file: IO[bytes], *, field: str) -> None:
    """Copies a file from there into an open one.

    Raises:
        UsageError: see `check`.
        OSError: it cannot be read.
    """
    check(url, field=field)

    def copy(fs: fsspec.AbstractFileSystem, path: str) -> None:
        file.seek(0)
        file.truncate()
        with fs.open(path, "rb") as source:
            shutil.copyfileobj(source, file, 2**20)
        file.flush()

    _tried(url, copy)


def read(url: str) -> bytes | None:
    """The content of a small file; None if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return _tried(url, lambda fs, path: fs.cat_file(path))
    return None


def size(url: str) -> int | None:
    """Bytes of a file; None if it is not there."""

    def ask(fs: fsspec.AbstractFileSystem, path: str) -> int:
        fs.invalidate_cache()
        return int(fs.info(path)["size"])

    with contextlib.suppress(FileNotFoundError):
        return _tried(url, ask)
    return None


def upload(file: Path, url: str) -> None:
    """Puts a file there, over the one that is there."""
    _tried(url, lambda fs, path: fs.put_file(str(file), path))


def remove(url: str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _tried(url, lambda fs, path: fs.rm_file(path))


def files_in(url: str) -> dict[str, str]:
    """What changes with the content of every file in a folder, by its path there; {} if there is no such folder."""

    def ask(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, str]:
        fs.invalidate_cache()
        found = fs.find(path, detail=True)
        prefix = fs._strip_protocol(path).rstrip("/") + "/"
        marks = ("size", "etag", "ETag", "md5Hash", "generation", "mtime", "updated", "LastModified", "created")
        return {
            name.removeprefix(prefix): str({mark: info[mark] for mark in marks if mark in info})
            for name, info in found.items()
            if name.startswith(prefix)
        }

    with contextlib.suppress(FileNotFoundError):
        return _tried(url, ask)
    return {}


def _tried(url: str, work: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """Does something with a file system and a path there, again if the connection or the service fails."""

    def once() -> T:
        with _told(url):
            fs, path = fsspec.core.url_to_fs(url)
            return work(fs, path)

    again = tenacity.retry_if_exception(lambda error: isinstance(error, OSError) and not isinstance(error, FINAL))
    return tenacity.Retrying(retry=again, wait=WAIT, stop=tenacity.stop_after_attempt(TRIES), reraise=True)(once)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Makes errors of the libraries, which have classes of their own, OSErrors that name the URL."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError):  # whose text is a path, or nothing
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
        number = error.errno if isinstance(error, OSError) else None
        told = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OSError(number or errno.EIO, told, url) from error
