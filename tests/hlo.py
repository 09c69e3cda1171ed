"""Reads compiled HLO text: what copies happen inside loops."""

import math
import re
from collections.abc import Iterator


def computations(text: str) -> dict[str, list[str]]:
    """Name of every computation -> its instructions; the entry's name is "ENTRY"."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            current = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif " = " in line:
            current.append(line.strip())
    return found


def _called(line: str) -> Iterator[tuple[str, bool]]:
    """Computations an instruction calls, and whether as the body of a loop."""
    for key, names in re.findall(r"(body|to_apply|calls|branch_computations)=\{?([^,}]*(?:, ?%[^,}]*)*)", line):
        for name in re.findall(r"%?([\w.\-]+)", names):
            yield name, key == "body"


def loop_copies(text: str, shape: str, *, depth: int) -> list[str]:
    """Copies of an array of the given shape ("[4,32]") in computations at least `depth` loops deep."""
    parts, seen, found = computations(text), set(), []

    def visit(name: str, loops: int) -> None:
        if (name, loops) in seen or name not in parts:
            return
        seen.add((name, loops))
        for line in parts[name]:
            if loops >= depth and re.search(r"= \w+" + re.escape(shape) + r"(\{[^}]*\})? copy(-start)?\(", line):
                found.append(line)
            for called, is_body in _called(line):
                visit(called, loops + is_body)

    visit("ENTRY", 0)
    assert any(loops >= depth for _, loops in seen), f"no loop {depth} deep"
    return found


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
ITEMSIZE = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def loop_collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes (of one device's result) of every collective inside a loop of a partitioned program."""
    parts, seen, found = computations(text), set(), []

    def visit(name: str, in_loop: bool) -> None:
        if (name, in_loop) in seen or name not in parts:
            return
        seen.add((name, in_loop))
        for line in parts[name]:
            made = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if in_loop and made:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", made[1])
                sizes = (ITEMSIZE[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes)
                found.append((made[2], sum(sizes)))
            for called, is_body in _called(line):
                visit(called, in_loop or is_body)

    visit("ENTRY", False)
    assert any(in_loop for _, in_loop in seen), "no loop"
    return found
