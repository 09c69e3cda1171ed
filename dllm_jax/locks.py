"""One writer for every output: a lock beside it, which the kernel releases however the process ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dllm_jax.errors import UsageError

SUFFIX = ".lock"


@contextlib.contextmanager
def only_writer(path: Path, *, field: str) -> Iterator[None]:
    """Refuses other processes that want to write the same output while the block runs.

    The lock is on the open file PATH.lock, not in its existence: one that a killed job left behind holds nobody up.

    Args:
        path: the output, resolved.
        field: the setting that names it, for the error.

    Raises:
        UsageError: another job writes it.
    """
    file = path.with_name(path.name + SUFFIX)
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{field}: expected no other job that writes {path}, got one that is running") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is locked: who opened it before finds it unlinked, and tries again
        lock.release()
