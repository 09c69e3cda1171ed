"""Sums over output lines, by task: what metrics are made of, without the lines."""

from collections.abc import Iterable, Mapping
from typing import Any

Sums = dict[str, int]
PHASE = "phase/"  # before the name of a phase


class Tally:
    """Sums over rows by the task of the rows (None without tasks), in the order in which tasks came first.

    Args:
        rows: to begin with.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.by_task: dict[Any, Sums] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        self._add(
            row.get("task"),
            {
                "rows": 1,
                "num_tokens": row["num_tokens"],
                "nfe": row["nfe"],
                "committed": sum(step > 0 for step in row.get("commit_step", ())),
                "errors": row.get("finish_reason") == "error",
                "correct": row.get("correct", False),
                **({"read_strictly": 1, "strict": row["correct_strict"]} if "correct_strict" in row else {}),
                **{f"{PHASE}{name}": count for name, count in row.get("forwards_by_phase", {}).items()},
            },
        )

    def merge(self, other: "Tally") -> None:
        """Adds the rows of another one, which come later."""
        for task, sums in other.by_task.items():
            self._add(task, sums)

    def _add(self, task: Any, sums: Mapping[str, int]) -> None:
        own = self.by_task.setdefault(task, {})
        for name, value in sums.items():
            own[name] = own.get(name, 0) + int(value)

    @property
    def total(self) -> Sums:
        """Over all tasks."""
        whole = Tally()
        for sums in self.by_task.values():
            whole._add(None, sums)
        return whole.by_task.get(None, {})

    def to_json(self) -> list[Any]:
        """All of it, for a file."""
        return [[task, sums] for task, sums in self.by_task.items()]

    @classmethod
    def from_json(cls, stored: Iterable[Any]) -> "Tally":
        """From what `to_json` gave."""
        tally = cls()
        for task, sums in stored:
            tally._add(task, sums)
        return tally
