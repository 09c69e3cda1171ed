"""Where outputs go: whether a file or folder can be written there, and that only one job does."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dllm_jax.errors import UsageError, naming

LOCK = ".lock"  # the suffix of a lock file
PROBE_BYTES = 2**26


def file_obstacle(path: Path) -> str:
    """Why a file cannot be written; "" if it can.

    Args:
        path: resolved.
    """
    if not path.parent.is_dir():
        return f"no folder {path.parent}"
    if obstacle := _name_obstacle(path):
        return obstacle
    if path.is_dir():
        return f"{path.name} is a folder"
    if path.exists() and not path.is_file():
        return f"{path.name} is a device or pipe"
    return f"no permission to write {path.name}" if path.exists() and not os.access(path, os.W_OK) else ""


def folder_obstacle(path: Path) -> str:
    """Why a folder cannot be made or replaced, its parents included; "" if it can.

    Args:
        path: resolved.
    """
    if obstacle := _name_obstacle(path):
        return obstacle
    return f"{path.name} is a file" if path.exists() and not path.is_dir() else ""


def _name_obstacle(path: Path) -> str:
    """Why there can be no new name in a folder."""
    parent = next(parent for parent in path.parents if parent.exists())
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(path.name)) > longest:
        return f"a name of more than {longest} bytes with what is added to it, {path.name[-20:]!r} at the end"
    if not parent.is_dir():
        return f"{parent} is no folder"
    return "" if os.access(parent, os.W_OK) else f"no permission to write in {parent}"


def check_room(folder: Path, size: int) -> None:
    """Fails before a long write that would, where that can be known: no space, a quota, a limit on files.

    Args:
        folder: where to write; it exists.
        size: bytes to write, in files of any size.

    Raises:
        OSError: naming the folder, with the bytes needed and there.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        told = f"{os.strerror(errno.ENOSPC)} ({size:,} bytes needed, {free:,} there)"
        raise OSError(errno.ENOSPC, told, str(folder))
    if size and hasattr(os, "posix_fallocate"):
        with naming(folder), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, min(size, PROBE_BYTES))


@contextlib.contextmanager
def only_writer(path: Path, *, field: str) -> Iterator[None]:
    """Refuses other processes that want to write the same output while the block runs.

    The lock is on the open file PATH.lock, not in its existence: the kernel releases it however the process ends, and
    a file that a killed job left behind holds nobody up.

    Args:
        path: the output, resolved.
        field: the setting that names it, for the error.

    Raises:
        UsageError: another job writes it.
    """
    file = path.with_name(path.name + LOCK)
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        got = "one that is running" if file.exists() else f"a folder where {file.name} cannot be made"
        raise UsageError(f"{field}: expected no other job that writes {path}, got {got}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is locked: who opened it before finds it unlinked, and tries again
        lock.release()
