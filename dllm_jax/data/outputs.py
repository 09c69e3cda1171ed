"""Results on disk: a partial file that grows batch by batch and can be continued, replaced as a whole at the end."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllm_jax.config import Config
from dllm_jax.errors import UsageError

Row = dict[str, Any]  # one line of the output: id, text, output_ids, num_tokens, nfe, commit_step, finish_reason


class ResultFile:
    """The output of one job: `PATH` and `PATH.metrics.json`, and `PATH.partial` until the job is finished.

    The first line of the partial file says which settings and prompts its rows belong to.

    Args:
        config: output.path (not empty), output.overwrite, input.path.

    Raises:
        UsageError: the output cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output.path).resolve()
        self.metrics_path = self.path.with_name(self.path.name + ".metrics.json")
        self.partial_path = self.path.with_name(self.path.name + ".partial")
        self._overwrite = config.output.overwrite
        self._header: Row = {}
        check_writable(self.path, config)

    def resume(self, header: Mapping[str, Any]) -> dict[int, Row]:
        """Reads what an earlier run left; must come before `append`.

        Args:
            header: settings (section -> field -> value) that decide the rows; written to a new partial file.

        Returns:
            The rows that are there, by index of the prompt.

        Raises:
            UsageError: they belong to other settings, and output.overwrite is off.
        """
        self._header = dict(header)
        found, rows, size = self._read_partial()
        if not rows:
            self.partial_path.unlink(missing_ok=True)
        elif change := difference(found, self._header):
            if not self._overwrite:
                raise UsageError(
                    f"output.path: expected the unfinished {self.partial_path.name} to have the same settings, "
                    f"got {change} (output.overwrite=true discards it)"
                )
            self.partial_path.unlink()
            rows = {}
        else:
            os.truncate(self.partial_path, size)
        return rows

    def append(self, rows: Mapping[int, Row]) -> None:
        """Adds finished rows, by index of the prompt, to the partial file."""
        new = not self.partial_path.exists()
        with self.partial_path.open("a", encoding="utf-8") as file:
            file.write(_lines([self._header] if new else []))
            file.write(_lines({"index": index, **row} for index, row in rows.items()))

    def finish(self, rows: Iterable[Row], metrics: Mapping[str, Any]) -> None:
        """Replaces output and metrics with those of the whole job, each in one step, and drops the partial file."""
        replace_file(self.path, _lines(rows))
        replace_file(self.metrics_path, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        self.partial_path.unlink(missing_ok=True)

    def _read_partial(self) -> tuple[Row, dict[int, Row], int]:
        """Header, rows and the bytes they take; a torn last line is left out."""
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


def check_writable(path: Path, config: Config) -> None:
    """Refuses an output that could not be written at the end of the job.

    Raises:
        UsageError: why not.
    """
    got = ""
    if not path.parent.is_dir():
        got = f"no folder {path.parent}"
    elif path.is_dir():
        got = "a folder"
    elif path.exists() and not path.is_file():
        got = "a device or pipe"
    elif not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        got = "no permission to write"
    elif config.input.path and path == Path(config.input.path).resolve():
        got = "the file of input.path"
    if got:
        raise UsageError(f"output.path: expected a file that can be written, got {config.output.path!r} ({got})")


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that differs between two headers, in words; "" if none does."""
    old, new = _flat(found), _flat(wanted)
    name = next((name for name in new if name not in old or old[name] != new[name]), "")
    if name == "prompts":
        return "other prompts"
    return f"{name} {old.get(name)!r} instead of {new[name]!r}" if name else ""


def _flat(header: Mapping[str, Any]) -> Row:
    flat = {}
    for name, value in header.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        flat.update({f"{name}.{field}".rstrip("."): entry for field, entry in fields})
    return flat


def _lines(records: Iterable[Row]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file so that at any moment either the old or the new content is there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
