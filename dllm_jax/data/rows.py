"""Output lines on disk: a file that grows as they are done, in any order, and files of them in input order."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dllm_jax.data.lazy import Lazy
from dllm_jax.errors import naming

Row = dict[str, Any]  # one line of the output: id, text, output_ids, num_tokens, nfe, commit_step, finish_reason
INDEX = "index"  # first field of a line that grows: the place in the input


def as_lines(records: Iterable[Row]) -> bytes:
    """Records as they are written."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


class GrowingRows:
    """Rows at the end of a file, by index; where each one lies is held, not what it says.

    Args:
        path: of the file, which others may begin.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self._indices, self._offsets = array("I"), array("Q")

    def note(self, index: int, offset: int) -> None:
        """Adds a row that is in the file."""
        self._indices.append(index)
        self._offsets.append(offset)

    def append(self, rows: Mapping[int, Row], *, head: Callable[[], bytes] = bytes) -> None:
        """Writes rows to the end of the file, behind what `head` gives if it is new."""
        with naming(self._path), self._path.open("ab") as file:
            offset = file.tell()
            content = [b"" if offset else head()]
            offset += len(content[0])
            for index, row in rows.items():
                content.append(as_lines([{INDEX: index, **row}]))
                self.note(index, offset)
                offset += len(content[-1])
            file.write(b"".join(content))

    @property
    def indices(self) -> np.ndarray:
        """Those of the rows, in ascending order, each once."""
        return np.unique(np.array(self._indices, np.uint32))

    def lines(self) -> Iterator[bytes]:
        """The rows in ascending order of their indices, as they stand in the output."""
        if not self._indices:
            return
        indices, first = np.unique(np.array(self._indices, np.uint32), return_index=True)
        with naming(self._path), self._path.open("rb") as file:
            for index, place in zip(indices, first, strict=True):
                file.seek(self._offsets[place])
                line = file.readline()
                mark = b'{"%s": %d, ' % (INDEX.encode(), index)
                yield b"{" + line[len(mark) :] if line.startswith(mark) else _without_index(line)


def _without_index(line: bytes) -> bytes:
    record = json.loads(line)
    del record[INDEX]
    return as_lines([record])


class Rows(Lazy[Row]):
    """The rows of output files, read when they are asked for.

    Args:
        files: what opens each of them, in order.
    """

    def __init__(self, files: Sequence[Callable[[], IO[bytes]]]) -> None:
        self._files = files
        self._open: tuple[int, IO[bytes]] | None = None
        self._places: list[tuple[int, int]] | None = None  # file and offset of every row

    def __iter__(self) -> Iterator[Row]:
        for number in range(len(self._files)):
            file = self._file(number)
            file.seek(0)
            while line := file.readline():
                offset = file.tell()
                yield json.loads(line)
                file = self._file(number)
                file.seek(offset)

    def __len__(self) -> int:
        return len(self._found())

    def item(self, place: int) -> Row:
        """Reads a row."""
        number, offset = self._found()[place]
        file = self._file(number)
        file.seek(offset)
        row: Row = json.loads(file.readline())
        return row

    def _found(self) -> list[tuple[int, int]]:
        if self._places is None:
            self._places = []
            for number in range(len(self._files)):
                file, offset = self._file(number), 0
                file.seek(0)
                for line in file:
                    self._places.append((number, offset))
                    offset += len(line)
        return self._places

    def hold(self) -> None:
        """Opens the first file, so that it may be unlinked."""
        self._file(0)

    def _file(self, number: int) -> IO[bytes]:
        if self._open and self._open[0] == number:
            return self._open[1]
        if self._open:
            self._open[1].close()
        self._open = number, self._files[number]()
        return self._open[1]
