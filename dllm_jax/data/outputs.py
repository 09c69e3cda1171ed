"""Files that are written as a whole, and whether what is there belongs to the job that would write it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dllm_jax.errors import UsageError, naming
from dllm_jax.places import LOCK, file_obstacle

VERSION = "dllm_jax"  # the first field of an identity: the package's version
IDENTITY, DIGEST = "identity", "output_sha256"  # in the metrics
TEMPORARY = ".tmp"
CONTENTS = {"prompts": "other prompts", "held_out": "other held-out samples", "answers": "other answers to learn"}


def check_writable(path: str, suffixes: Iterable[str], *, field: str = "output.path") -> list[Path]:
    """Refuses an output that could not be written at the end of the job.

    Args:
        path: what the setting says.
        suffixes: what is added to it for the files to be written.
        field: the setting, for the error.

    Returns:
        The files, resolved, then those that are there while they are written: everything a job may touch.

    Raises:
        UsageError: why not.
    """
    try:
        target = Path(path).resolve()
        files = [target.with_name(target.name + suffix) for suffix in suffixes]
        names = [*files, *(file.with_name(file.name + TEMPORARY) for file in files)]
        names.append(target.with_name(target.name + LOCK))
        got = next(filter(None, map(file_obstacle, names)), "")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of symlinks
        got = getattr(error, "strerror", None) or str(error)
    if got:
        raise UsageError(f"{field}: expected a file that can be written, got {path!r} ({got})")
    return names


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting or file that differs between two identities, in words; "" if none does.

    Of settings only those wanted count, of the section `files` all. They are compared as JSON, which one of them was.
    """
    old, new = (_flat(json.loads(json.dumps(identity))) for identity in (found, wanted))
    gone = [name for name in old if name.startswith("files.")] if "files" in wanted else []
    name = next((name for name in (*new, *gone) if name not in old or old[name] != new.get(name)), "")
    if name.startswith("files."):
        what = "another" if name in old and name in new else "a new" if name in new else "no"
        return f"{what} {name.removeprefix('files.')}"
    return CONTENTS.get(name) or (f"{name} {old.get(name)!r} instead of {new[name]!r}" if name else "")


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in identity.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        flat.update({f"{name}.{field}".rstrip("."): entry for field, entry in fields})
    return flat


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file so that at any moment either the old or the new content is there.

    Raises:
        OSError: naming the file; nothing is left of the new content.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of the one at `path` when the block has succeeded.

    Raises:
        OSError: naming the file; nothing is left of the new content.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with naming(temporary), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
