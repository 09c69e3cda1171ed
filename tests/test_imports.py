"""The table of CONTRIBUTING.md: who may import whom, and who needs no JAX."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("dllm_jax", "decode", "train", "configs")
JAX = {"jax", "flax", "optax", "orbax"}


class Room(NamedTuple):
    """A file or folder of the table."""

    may_import: frozenset[str]  # rooms, itself included
    without_jax: bool


def read_table() -> dict[str, Room]:
    """The rooms by their paths, as "dllm_jax/models/"."""
    rooms: dict[str, Room] = {}
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    start = lines.index("| Where | What lives there | May import |") + 2
    for line in lines[start : lines.index("", start)]:
        places, text, imported = line.strip("|").split("|")
        allowed = frozenset[str]().union(*(rooms[room].may_import for room in paths(imported)))  # all are above
        for room in paths(places):
            allowed |= {room}
            rooms[room] = Room(allowed, "no JAX" in text)
    return rooms


def paths(cell: str) -> list[str]:
    """The files and folders that a cell names."""
    names = (name for name in re.findall(r"`([^`]+)`", cell) if name != "dllm_jax/")
    return [name if name.partition("/")[0] in TOPS else f"dllm_jax/{name}" for name in names]


TABLE = read_table()


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    files = [file.relative_to(ROOT) for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def room_of(file: Path) -> str:
    """The innermost place of the table that holds a file."""
    held = [room for room in TABLE if str(file) == room or (room.endswith("/") and str(file).startswith(room))]
    assert held, f"{file} has no place in CONTRIBUTING's table"
    return max(held, key=len)


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports anywhere, and whether as soon as it is imported itself."""
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else node.module), node in tree.body


@pytest.mark.parametrize("file", MODULES.values(), ids=str)
def test_a_file_imports_what_the_table_allows(file: Path) -> None:
    room = room_of(file)
    for name, at_once in imported(file):
        if name in MODULES:
            other = room_of(MODULES[name])
            assert other in TABLE[room].may_import, f"{file} imports {name}: {room} may not import {other}"
            without_jax = not at_once or TABLE[other].without_jax
        else:
            without_jax = not at_once or name.partition(".")[0] not in JAX
        assert without_jax or not TABLE[room].without_jax, f"{file} imports {name}: {room} has no JAX"


def test_every_place_of_the_table_has_modules() -> None:
    assert {room_of(file) for file in MODULES.values()} == set(TABLE)
