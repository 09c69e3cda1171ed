"""Checkpoints at a URL: copied to this machine once, and again when they have changed there."""

import functools
import hashlib
import os
from pathlib import Path

from filelock import FileLock

from dllm_jax import remote
from dllm_jax.errors import UsageError, naming

CACHE = "~/.cache/dllm_jax/checkpoints"
DONE = ".whole"  # beside a copy that has all files


@functools.cache
def copied(url: str, *, field: str) -> Path:
    """The copy of a checkpoint on this machine.

    What was copied when a copy was cut off is not copied again. Processes of one machine copy once.

    Args:
        url: of a folder, or of one file.
        field: the setting that it comes from, for errors.

    Raises:
        UsageError: there is none, or no way to read it.
        OSError: it cannot be read.
    """
    remote.check(url, field=field)
    files = remote.files_in(url)
    alone = not files
    if alone and (size := remote.size(url)) is not None:
        files = {url.rpartition("/")[2]: str(size)}
    if not files:
        raise UsageError(f"{field}: expected a folder or file, got {url!r}, where nothing is")
    version = hashlib.sha256(repr((url.rstrip("/"), sorted(files.items()))).encode()).hexdigest()[:16]
    folder = Path(CACHE).expanduser() / version / url.rstrip("/").rpartition("/")[2]
    done = folder.with_name(folder.name + DONE)
    with naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not done.exists():
                for name in files:
                    source, target = (url, folder) if alone else (f"{url.rstrip('/')}/{name}", folder / name)
                    _copy(source, target, time=int(version[:8], 16), field=field)
                done.touch()
    return folder


def _copy(url: str, path: Path, *, time: int, field: str) -> None:
    """Copies a file; its time is that of the version, since it counts for the identity of a job on any machine."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w+b") as file:
        remote.fetch(url, file, field=field)
    os.utime(temporary, (time, time))
    temporary.replace(path)
