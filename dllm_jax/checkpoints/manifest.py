"""manifest.json of a converted checkpoint: size and SHA-256 of every file, written last.

Orbax does not checksum arrays, so a flipped bit would load silently; a folder without a manifest was never finished.
Several files are read at once.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dllm_jax.checkpoints.files import abbreviate, read_json
from dllm_jax.errors import UsageError

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describes every file in the folder; call it when nothing else will be written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(_sha256, paths))
    entries = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    }
    (folder / NAME).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def verify_folder(folder: Path, *, checksums: bool = True) -> int:
    """Compares a folder with its manifest.

    Args:
        folder: a converted checkpoint.
        checksums: read every file, instead of looking only at presence and sizes.

    Returns:
        The number of files that were checked.

    Raises:
        UsageError: no manifest, or files that are missing, of another size or changed, each by name.
    """
    if not (folder / NAME).is_file():
        raise UsageError(f"{folder}: expected a complete converted checkpoint, got one without {NAME} (half-written?)")
    entries = read_json(folder / NAME).get("files")
    well_formed = isinstance(entries, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in entries.values()
    )
    if not entries or not well_formed:
        raise UsageError(f"{folder / NAME}: expected size and sha256 of every file under files, got something else")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _problem(folder, name, entries[name], checksums=checksums), entries)
        problems = [problem for problem in found if problem]
    if problems:
        raise UsageError(f"{folder}: expected the files of {NAME}, got {len(problems)} bad: {abbreviate(problems)}")
    return len(entries)


def _problem(folder: Path, name: str, entry: Mapping[str, Any], *, checksums: bool) -> str:
    """What is wrong with a file; "" if nothing is."""
    path = folder / name
    if not path.is_file():
        return f"{name} (missing)"
    if path.stat().st_size != entry["size"]:
        return f"{name} (expected {entry['size']} bytes, got {path.stat().st_size})"
    if checksums and _sha256(path) != entry["sha256"]:
        return f"{name} (corrupted: another checksum)"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
