"""What a job reads besides its settings: which files, and whether they are still the same.

Small files are hashed as a whole. Of a larger one the digest covers size, modification time, the first megabyte (where
the header of a safetensors file is) and `SAMPLES` pieces at even distances, so that 16 GB take a fraction of a second.
Any change is noticed but one: bytes of a large file between the samples, by a tool that puts the old time back. A large
file that is copied or touched counts as another one. A converted folder stands in its manifest, which holds the
checksum of every file: that the files still match it is checked when the folder is loaded (`model.verify`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.manifest import NAME as MANIFEST
from dllm_jax.errors import UsageError

WHOLE_BYTES = 2**26  # files up to here are hashed as a whole
HEAD_BYTES = 2**20
SAMPLES, SAMPLE_BYTES = 64, 2**16
TIME = "@"  # in the digest of a large file, before its modification time
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", MANIFEST)
SETTINGS = ("config.json", files.ADAPTER, files.GENERATION, *files.TOKENIZER)


def fingerprint(places: Mapping[str, Path]) -> dict[str, str]:
    """A digest of every file that is read of every place, by "FILE of SETTING"; see the module.

    Args:
        places: setting -> the file or folder it stands for; see `identity.sources`.
    """
    return {
        f"{path.relative_to(place) if place.is_dir() else path.name} of {field}": _digest(path)
        for field, place in places.items()
        for path in sorted(read_files(place, tokenizer_only=field == "tokenizer.path"))
    }


def without_times(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a job, with the content of its files alone: hosts may have copies of them."""
    digests = {name: digest.partition(TIME)[0] for name, digest in identity["files"].items()}
    return {**identity, "files": digests}


def read_files(place: Path, *, tokenizer_only: bool = False) -> Iterator[Path]:
    """The files that are read of a checkpoint.

    Args:
        place: a checkpoint's file or folder.
        tokenizer_only: only its tokenizer is.
    """
    if place.is_file():
        yield place
        return
    patterns = files.TOKENIZER if tokenizer_only else (*WEIGHTS, *SETTINGS)
    names = [path for path in place.iterdir() if path.is_file() and any(fnmatch(path.name, p) for p in patterns)]
    has_weights = any(fnmatch(path.name, pattern) for path in names for pattern in WEIGHTS)
    if tokenizer_only or has_weights:
        yield from names
    else:  # arrays of Orbax without a manifest
        yield from (path for path in place.rglob("*") if path.is_file())


def check_apart(written: Iterable[Path], places: Mapping[str, Path], *, field: str) -> None:
    """Refuses a job that would write over what it reads.

    Args:
        written: the names of files and folders that the job writes, resolved.
        places: setting -> the file or folder that the job reads.
        field: the setting that the names come from, for the error.

    Raises:
        UsageError: naming both.
    """
    for path in written:
        for setting, place in places.items():
            if _is_read(path, place.resolve()):
                raise UsageError(f"{field}: expected a place apart from {setting}, got {path}, which that reads")


def _is_read(path: Path, place: Path) -> bool:
    """Whether a name is a read file, would become one, or is a folder around one."""
    if place.is_relative_to(path):
        return True
    if not place.is_dir():
        return path.exists() and place.exists() and path.samefile(place)
    if path.parent == place and any(fnmatch(path.name, pattern) for pattern in (*WEIGHTS, *SETTINGS)):
        return True
    return path.exists() and any(path.samefile(file) for file in read_files(place))


def _digest(path: Path) -> str:
    stat = path.stat()
    with path.open("rb") as file:
        if stat.st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(stat.st_size).encode())
        sha.update(file.read(HEAD_BYTES))
        for sample in range(SAMPLES):
            file.seek((stat.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            sha.update(file.read(SAMPLE_BYTES))
    return f"{sha.hexdigest()}{TIME}{stat.st_mtime_ns}"
