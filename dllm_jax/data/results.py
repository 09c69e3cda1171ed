"""The results of a job on disk: lines that grow batch by batch and can be continued, then files in input order."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dllm_jax.data.away import CHANGED, GONE, Away
from dllm_jax.data.outputs import DIGEST, IDENTITY, VERSION, check_writable, difference, replace_file, replacing
from dllm_jax.data.rows import INDEX, GrowingRows, Row, Rows, as_lines
from dllm_jax.data.tally import Tally
from dllm_jax.errors import UsageError
from dllm_jax.settings import OutputSettings

METRICS, PARTIAL, ERRORS = ".metrics.json", ".partial", ".errors.jsonl"  # what is added to the output's name
PART = "part"  # first field of a line of the partial file that stands for a finished file of the output
SIZE, SHARDS, MERGED = "output_bytes", "shards", "merged_shards"  # in the metrics; the last: how many there were


MOST_SHARDS = 2000  # the partial file, which names all that are done, is written with every one


class Finished(NamedTuple):
    """What a finished job left."""

    rows: Rows
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of the output that is done."""

    name: str
    size: int  # bytes
    sha256: str
    tally: Tally

    def to_json(self) -> Row:
        """All of it, for a line."""
        return {"name": self.name, "size": self.size, "sha256": self.sha256, "tally": self.tally.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Part":
        """From what `to_json` gave."""
        return cls(stored["name"], stored["size"], stored["sha256"], Tally.from_json(stored["tally"]))


class ResultFile:
    """The output of one job: `PATH` (or its shards) and `PATH.metrics.json`, and `PATH.partial` until all is done.

    The first line of the partial file, and the metrics, hold the identity of the job that the rows belong to. Behind it
    the partial file has a line for every finished file of the output, then rows of the next one, in any order. A file
    of the output comes into being as a whole, and then the partial file as a whole without its rows. So wherever a job
    is cut off, either the partial file is still there, or the output and its metrics belong together.

    Args:
        output: path (not empty), shards, overwrite.
        field: the setting that the path comes from, for errors.

    Raises:
        UsageError: the output cannot be written.
    """

    def __init__(self, output: OutputSettings, *, field: str = "output.path") -> None:
        self.field = field
        self._away = Away.of(output, field=field)
        suffixes = ("", METRICS, PARTIAL, ERRORS)
        self.names = check_writable(self._away.path, suffixes, field=field)
        self.path, self.metrics_path, self.partial_path, self.errors_path, *_ = self.names
        self._output = output
        self._identity: Row = {}
        self._rows = GrowingRows(self.partial_path)
        self._parts: dict[int, Part] = {}  # those that are done
        self._targets = [self.path]  # the file of every part

    def begin(self, identity: Mapping[str, Any]) -> Finished | None:
        """Looks at what earlier runs left, and makes way for this one; must come first.

        Args:
            identity: settings (section -> field -> value) and whatever else decides the rows; `VERSION` comes first.

        Returns:
            The results, if the job is finished.

        Raises:
            UsageError: there is an output of another identity, or one that no job wrote, and output.overwrite is off.
        """
        self._identity = dict(identity)
        self._away.fetch_partial(self.partial_path)
        self._away.fetch(self.metrics_path)
        finished, change = self._read_finished()
        if finished:
            return self._cleared(finished)
        found, size = self._read_partial()
        if found and self._begun and not difference(found, identity):
            os.truncate(self.partial_path, size)
            return None
        if not self._output.overwrite and change:
            raise UsageError(
                f"{self.field}: expected {self.path.name} to be what this job writes, got {change} "
                "(output.overwrite=true replaces it)"
            )
        if not self._output.overwrite and (self._begun or not self._is_torn()):
            change = difference(found, identity) if self._begun else "a file that no job wrote"
            raise UsageError(
                f"{self.field}: expected the unfinished {self.partial_path.name} to have the same settings, "
                f"got {change} (output.overwrite=true discards it)"
            )
        self._rows.clear()
        self._parts.clear()
        self.partial_path.unlink(missing_ok=True)
        self._away.put_head(self.partial_path, self._head())
        return None

    def divide(self, count: int) -> list[range]:
        """Settles which rows each file of the output has.

        Args:
            count: rows of the whole job.

        Returns:
            Places in the input, for each file.

        Raises:
            UsageError: there would be too many files, a finished one was changed since, or one is there that no job
                wrote; the latter two not if it may be replaced.
        """
        size = self._output.shard_lines or count
        if count > size * MOST_SHARDS:
            raise UsageError(
                f"output.shard_lines: expected at least {-(-count // MOST_SHARDS)} for {count} lines (at most "
                f"{MOST_SHARDS} files), got {size}"
            )
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        if self._output.shard_lines:
            self._targets = [shard(self.path, number, len(parts)) for number in range(len(parts))]
        before = len(self._parts)
        for number, target in enumerate(self._targets):
            told = self._away.state(target, self._parts.get(number))
            if told == GONE or (told and self._output.overwrite):  # then its lines are decoded again
                self._parts.pop(number, None)
            elif told and (number in self._parts or (self._output.shard_lines and not len(self._rows.indices))):
                raise UsageError(
                    f"{self.field}: expected {target.name} to be what this job writes, got {told} "
                    "(output.overwrite=true replaces it)"
                )
        if len(self._parts) < before:
            self._rows.clear()
            replace_file(self.partial_path, self._head())
        return parts

    @property
    def targets(self) -> list[Path]:
        """The files of the output, on this machine."""
        return self._targets

    def done(self, number: int) -> np.ndarray | None:
        """Indices of the rows that are there of a file of the output, in ascending order; None: the file is done."""
        return None if number in self._parts else self._rows.indices

    def append(self, rows: Mapping[int, Row]) -> None:
        """Adds finished rows of the file that is being made, by index of the prompt."""
        self._rows.append(rows, head=self._head)

    def close(self, number: int) -> None:
        """Writes a file of the output, of which all rows are there."""
        tally = Tally()
        target, sha = self._targets[number], hashlib.sha256()
        if not self._output.shard_lines:
            self.metrics_path.unlink(missing_ok=True)  # of an older output
        with replacing(target) as file:
            for line in self._rows.lines():
                tally.add(json.loads(line))
                sha.update(line)
                file.write(line)
            size = file.tell()
        self._away.put(target)
        self._parts[number] = Part(target.name, size, sha.hexdigest(), tally)
        replace_file(self.partial_path, self._head())
        self._rows.clear()
        self._away.put(self.partial_path, keep=True)

    def finish(self, metrics_of: Callable[[Tally], Mapping[str, Any]]) -> dict[str, Any]:
        """Writes the metrics when all files are done, merges these if that is asked for, and drops the partial file.

        Args:
            metrics_of: gives the metrics, from the sums over all rows.
        """
        tally = Tally()
        parts = [self._parts[number] for number in range(len(self._targets))]
        for part in parts:
            tally.merge(part.tally)
        metrics = {**metrics_of(tally), IDENTITY: self._identity}
        if not self._output.shard_lines:
            return self._write_metrics({**metrics, DIGEST: parts[0].sha256, SIZE: parts[0].size})
        left = [{"name": part.name, "size": part.size, "sha256": part.sha256} for part in parts]
        if self._output.shards == "merge":
            return self._merged(metrics | {SHARDS: left})
        self._away.remove(self.path)  # an older output that this one replaces
        return self._write_metrics(metrics | {SHARDS: left})

    def rows(self) -> Rows:
        """The rows of the finished job, in input order."""
        left = self._output.shard_lines and self._output.shards == "leave"
        return Rows([self._away.opener(path) for path in (self._targets if left else [self.path])])

    def write_errors(self, lines: Iterable[bytes] | None) -> None:
        """Writes the input lines that were left out beside the output, or removes what an earlier run wrote of them."""
        if lines is None:
            self.errors_path.unlink(missing_ok=True)
            return
        with replacing(self.errors_path) as file:
            file.writelines(lines)
        self._away.put(self.errors_path)

    @property
    def _begun(self) -> bool:
        """Whether rows are there."""
        return bool(self._parts) or bool(len(self._rows.indices))

    def _head(self) -> bytes:
        """The beginning of the partial file."""
        done = [{PART: number, **part.to_json()} for number, part in sorted(self._parts.items())]
        return as_lines([self._identity, *done])

    def _write_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        replace_file(self.metrics_path, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        self._away.put(self.metrics_path)
        for number in range(metrics.get(MERGED, 0)):
            self._away.remove(shard(self.path, number, metrics[MERGED]))
        self._away.remove(self.partial_path)
        return metrics

    def _merged(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Makes one file of the shards that the metrics name, and then drops them."""
        names, sha = [part["name"] for part in metrics.pop(SHARDS)], hashlib.sha256()
        with replacing(self.path) as file:
            for name in names:
                with contextlib.closing(self._away.opener(self.path.with_name(name))()) as source:
                    while piece := source.read(2**20):
                        sha.update(piece)
                        file.write(piece)
            size = file.tell()
        self._away.put(self.path)
        return self._write_metrics(metrics | {DIGEST: sha.hexdigest(), SIZE: size, MERGED: len(names)})

    def _cleared(self, finished: Finished) -> Finished:
        """Does what a job that was cut off at its very end has left to do."""
        metrics = finished.metrics
        if SHARDS in metrics and self._output.shards == "merge":
            metrics = self._merged(dict(metrics))
            return Finished(Rows([self._away.opener(self.path)]), metrics)
        for number in range(metrics.get(MERGED, 0)):
            self._away.remove(shard(self.path, number, metrics[MERGED]))
        found, _ = self._read_partial()
        if found and not difference(found, self._identity):
            self._away.remove(self.partial_path)
        return finished

    def _read_finished(self) -> tuple[Finished | None, str]:
        """The results of this job if they are there, else what is there instead ("" if nothing is)."""
        if not self._away.is_there(self.path) and not self.metrics_path.exists():
            return None, ""
        try:
            metrics = json.loads(self.metrics_path.read_bytes()) if self.metrics_path.exists() else {}
        except ValueError:
            metrics = {}
        if not isinstance(metrics, dict) or not isinstance(metrics.get(IDENTITY), dict):
            return None, "a file that no job of this version wrote"
        if change := difference(metrics[IDENTITY], self._identity):
            return None, change
        whole = {"name": self.path.name, "size": metrics.get(SIZE), "sha256": metrics.get(DIGEST)}
        parts = metrics.get(SHARDS, [whole])
        for part in parts:
            stored = Part(part["name"], part["size"], part["sha256"], Tally())
            if self._away.state(self.path.with_name(stored.name), stored):
                return None, CHANGED
        return Finished(Rows([self._away.opener(self.path.with_name(part["name"])) for part in parts]), metrics), ""

    def _read_partial(self) -> tuple[Row, int]:
        """Identity, and the bytes that it and the rows take, which are noted; a torn last line is left out."""
        self._rows.clear()
        self._parts.clear()
        header: Row | None = None
        size = 0
        for line in _lines_of(self.partial_path):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            if header is None:
                header = record
            elif VERSION not in header:
                break
            elif PART in record:
                self._parts[record[PART]] = Part.from_json(record)
            else:
                self._rows.note(record[INDEX], size)
            size += len(line)
        return header or {}, size

    def _is_torn(self) -> bool:
        """Whether the partial file, which has no rows, is the beginning of one of ours, or absent."""
        mark = json.dumps({VERSION: ""})[:-2].encode()
        content = self.partial_path.read_bytes()[: len(mark)] if self.partial_path.exists() else b""
        return mark.startswith(content)


def shard(path: Path, number: int, count: int) -> Path:
    """The name of one of `count` files of an output."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def _lines_of(path: Path) -> Iterator[bytes]:
    if path.exists():
        file: IO[bytes]
        with path.open("rb") as file:
            yield from file
