"""Results on disk: a partial file that grows batch by batch and can be continued, replaced as a whole at the end."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dllm_jax.errors import UsageError, naming
from dllm_jax.places import LOCK, file_obstacle
from dllm_jax.settings import OutputSettings

Row = dict[str, Any]  # one line of the output: id, text, output_ids, num_tokens, nfe, commit_step, finish_reason
VERSION = "dllm_jax"  # the first field of an identity: the package's version
IDENTITY, DIGEST = "identity", "output_sha256"  # in the metrics
TEMPORARY = ".tmp"
CONTENTS = {"prompts": "other prompts", "held_out": "other held-out samples", "answers": "other answers to learn"}


class Finished(NamedTuple):
    """What a finished job left."""

    rows: list[Row]
    metrics: dict[str, Any]


class ResultFile:
    """The output of one job: `PATH` and `PATH.metrics.json`, and `PATH.partial` until the job is finished.

    The first line of the partial file, and the metrics, hold the identity of the job that the rows belong to.

    Args:
        output: path (not empty) and overwrite.
        field: the setting that the path comes from, for errors.

    Raises:
        UsageError: the output cannot be written.
    """

    def __init__(self, output: OutputSettings, *, field: str = "output.path") -> None:
        self.field = field
        self.path, self.metrics_path, self.partial_path, *_ = self.names = check_writable(
            output.path, ("", ".metrics.json", ".partial"), field=field
        )
        self._overwrite = output.overwrite
        self._identity: Row = {}

    def begin(self, identity: Mapping[str, Any]) -> Finished | dict[int, Row]:
        """Looks at what earlier runs left, and makes way for this one; must come before `append`.

        Args:
            identity: settings (section -> field -> value) and whatever else decides the rows; `VERSION` comes first.

        Returns:
            The results, if the job is finished; else the rows that are there, by index of the prompt.

        Raises:
            UsageError: there is an output of another identity, or one that no job wrote, and output.overwrite is off.
        """
        self._identity = dict(identity)
        found, rows, size = self._read_partial()
        if rows and not difference(found, identity):
            os.truncate(self.partial_path, size)
            return rows
        finished, change = self._read_finished()
        if finished:
            return finished
        if not self._overwrite and change:
            raise UsageError(
                f"{self.field}: expected {self.path.name} to be what this job writes, got {change} "
                "(output.overwrite=true replaces it)"
            )
        if not self._overwrite and (rows or not self._is_torn()):
            change = difference(found, identity) if rows else "a file that no job wrote"
            raise UsageError(
                f"{self.field}: expected the unfinished {self.partial_path.name} to have the same settings, "
                f"got {change} (output.overwrite=true discards it)"
            )
        self.partial_path.unlink(missing_ok=True)
        return {}

    def append(self, rows: Mapping[int, Row]) -> None:
        """Adds finished rows, by index of the prompt, to the partial file."""
        new = not self.partial_path.exists()
        with naming(self.partial_path), self.partial_path.open("a", encoding="utf-8") as file:
            file.write(_lines([self._identity] if new else []))
            file.write(_lines({"index": index, **row} for index, row in rows.items()))

    def finish(self, rows: Iterable[Row], metrics: Mapping[str, Any]) -> None:
        """Replaces output and metrics with those of the whole job, each in one step, and drops the partial file.

        Wherever it is cut off, either the partial file is still there, or output and metrics belong together.
        """
        content = _lines(rows).encode()
        marks = {IDENTITY: self._identity, DIGEST: hashlib.sha256(content).hexdigest()}
        self.metrics_path.unlink(missing_ok=True)
        replace_file(self.path, content)
        replace_file(self.metrics_path, json.dumps({**metrics, **marks}, indent=2, ensure_ascii=False) + "\n")
        self.partial_path.unlink(missing_ok=True)

    def _read_finished(self) -> tuple[Finished | None, str]:
        """The results of this job if they are there, else what is there instead ("" if nothing is)."""
        if not self.path.exists() and not self.metrics_path.exists():
            return None, ""
        content = self.path.read_bytes() if self.path.exists() else b""
        try:
            metrics = json.loads(self.metrics_path.read_bytes()) if self.metrics_path.exists() else {}
        except ValueError:
            metrics = {}
        if not isinstance(metrics, dict) or not isinstance(metrics.get(IDENTITY), dict):
            return None, "a file that no job of this version wrote"
        if change := difference(metrics[IDENTITY], self._identity):
            return None, change
        if hashlib.sha256(content).hexdigest() != metrics.get(DIGEST):
            return None, "a file that was changed since"
        return Finished([json.loads(line) for line in content.splitlines()], metrics), ""

    def _read_partial(self) -> tuple[Row, dict[int, Row], int]:
        """Identity, rows and the bytes they take; a torn last line is left out."""
        records: list[Row] = []
        size = 0
        content = self.partial_path.read_bytes() if self.partial_path.exists() else b""
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            records.append(record)
            size += len(line)
        header, *rows = records or [{}]
        return header, {row.pop("index", -1): row for row in rows}, size

    def _is_torn(self) -> bool:
        """Whether the partial file, which has no rows, is the beginning of one of ours, or absent."""
        mark = json.dumps({VERSION: ""})[:-2].encode()
        content = self.partial_path.read_bytes()[: len(mark)] if self.partial_path.exists() else b""
        return mark.startswith(content)


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


def _flat(identity: Mapping[str, Any]) -> Row:
    flat = {}
    for name, value in identity.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        flat.update({f"{name}.{field}".rstrip("."): entry for field, entry in fields})
    return flat


def _lines(records: Iterable[Row]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file so that at any moment either the old or the new content is there.

    Raises:
        OSError: naming the file; nothing is left of the new content.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with naming(temporary), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
