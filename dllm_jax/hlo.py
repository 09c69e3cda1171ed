"""Reads a compiled program's HLO text: its loops, what moves between devices in them, and what is copied.

The text is the partitioned program, so every shape and every number is of one device. Written for what XLA prints for
CPU, GPU and TPU; `compiled.as_text()` gives it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_PLACE = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r"known_trip_count[^\d{]*\{[^\d]*(\d+)")
_ASYNC_DONE = 'custom_call_target="AsyncCollectiveDone"'
_ON_CHIP = "S(1)"  # in a layout: the fast memory of a TPU core
_COPIES = {"copy", "transpose", "convert", "dynamic-slice"}  # that make an array of what is there already
_MOVES_ONLY = _COPIES | {"parameter", "constant", "bitcast", "reshape"}


class ArrayType(NamedTuple):
    """An array in the text."""

    dtype: str  # as HLO names it: bf16, s32, pred
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Its size, padding not counted."""
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits[0]) if digits else 8 if self.dtype == "pred" else 0
        return math.prod(self.shape) * bits // 8

    @property
    def form(self) -> tuple[str, tuple[int, ...]]:
        """What a transpose or a reshape over axes of 1 leaves as it is."""
        return self.dtype, tuple(sorted(size for size in self.shape if size != 1))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str  # of its result: an array, or a tuple in parentheses
    line: str

    @functools.cached_property
    def arrays(self) -> list[ArrayType]:
        """The arrays of its result."""
        return [
            ArrayType(dtype, tuple(map(int, filter(None, sizes.split(",")))), layout)
            for dtype, sizes, layout in _ARRAY.findall(self.type)
        ]

    @functools.cached_property
    def called(self) -> list[tuple[str, str]]:
        """The computations that it calls, each with the name of the attribute."""
        return [(key, name) for key, names in _CALLED.findall(self.line) for name in re.findall(r"[\w.\-]+", names)]

    @property
    def place(self) -> str:
        """Where in the traced function it comes from: the names of loops and scopes around it, with slashes."""
        match = _PLACE.search(self.line)
        return match[1] if match else ""


class Moved(NamedTuple):
    """A collective."""

    kind: str  # one of COLLECTIVES
    bytes: int  # of the whole array that it makes or takes, whichever is larger
    group: int  # devices that take part together

    @property
    def sent(self) -> float:
        """Bytes that every device sends at least, in a ring."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (self.group - 1) / self.group


class Program:
    """A parsed program.

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.computations = _computations(text)
        self._reach: dict[str, frozenset[str]] = {}
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        self.devices = math.prod(map(int, counts))

    def loop_bodies(self, scope: str) -> list[str]:
        """The bodies of the loops whose trips run a named scope (`jax.named_scope`), each once, in no other loop of it.

        They are found by depth: that of the loops around the scope in the traced function. What the compiler hoists out
        of a loop keeps its place's name but lies less deep; loops inside the scope lie deeper.
        """
        depths = [
            instruction.place.partition(f"/{scope}/")[0].count("while/body")
            for lines in self.computations.values()
            for instruction in lines
            if f"/{scope}/" in instruction.place
        ]
        if not depths:
            return []
        return [body for body in self.bodies(max(depths)) if self._mentions(body, scope)]

    def bodies(self, depth: int) -> list[str]:
        """The bodies of loops so deep in the program, 1 for those in no other."""
        return list(dict.fromkeys(self._bodies("ENTRY", depth=depth)))

    def executed(
        self, name: str, *, without: Iterable[str] = (), into_fusions: bool = False
    ) -> list[tuple[Instruction, int]]:
        """The instructions that one run of a computation executes, and how often each.

        Of a conditional the branch that makes the most bytes counts; a loop inside whose number of trips is not known
        counts as one trip.

        Args:
            name: of the computation.
            without: bodies of loops that are left out, together with the loops around them.
            into_fusions: also what is inside of fusions (on TPU collectives may be).
        """
        found: list[tuple[Instruction, int]] = []
        skipped = frozenset(without)
        for instruction in self.computations.get(name, []):
            found.append((instruction, 1))
            branches = []
            for key, called in instruction.called:
                if key == "condition" or (_is_fused(instruction) and not (into_fusions and self._begins(called))):
                    continue
                if skipped and key == "body" and not skipped.isdisjoint(self._reached(called)):
                    continue
                inner = self.executed(called, without=skipped, into_fusions=into_fusions)
                if instruction.opcode == "conditional":
                    branches.append(inner)
                elif instruction.opcode == "while":
                    trips = self._trips(instruction)
                    found += [(each, times * trips) for each, times in inner]
                else:
                    found += inner
            if branches:
                found += max(branches, key=_bytes)
        return found

    def bytes_made(self, name: str) -> int:
        """Bytes that the instructions of one run of a computation make: how much work it is, about."""
        return _bytes(self.executed(name))

    def moved(self, name: str, *, without: Iterable[str] = ()) -> list[Moved]:
        """The collectives of one run of a computation; see `executed`."""
        return [
            _moved(instruction, self.devices)
            for instruction, times in self.executed(name, without=without, into_fusions=True)
            for _ in range(times)
            if instruction.opcode.removesuffix("-start") in COLLECTIVES
        ]

    def copies(self, name: str, arrays: Sequence[ArrayType], *, without: Iterable[str] = ()) -> list[ArrayType]:
        """What one run of a computation copies of arrays like those given: as they are, sliced, transposed, ...

        That is every array made so in main memory with the dtype and, in any order, the axes of one of them, also as a
        fusion that does nothing else. Reading an array ahead into the fast memory of a TPU core is no copy.

        Args:
            name: of the computation.
            arrays: what to look for; layouts do not count.
            without: bodies of loops that are left out.
        """
        forms = {array.form for array in arrays}
        return [
            instruction.arrays[0]
            for instruction, times in self.executed(name, without=without)
            for _ in range(times)
            if self._is_copy(instruction) and instruction.arrays and instruction.arrays[0].form in forms
        ]

    def _is_copy(self, instruction: Instruction) -> bool:
        if instruction.arrays and _ON_CHIP in instruction.arrays[0].layout:
            return False
        if instruction.opcode == "fusion":
            opcodes = {inner.opcode for _, name in instruction.called for inner in self.computations.get(name, [])}
            return opcodes <= _MOVES_ONLY and bool(opcodes & _COPIES)
        return instruction.opcode.removesuffix("-start") in _COPIES

    def _begins(self, name: str) -> bool:
        """False for what goes on with a collective that was started before: TPUs name it in every part of it."""
        ends = any(_ASYNC_DONE in instruction.line for instruction in self.computations.get(name, []))
        return not ends and not name.startswith("async_collective_fusion")

    def _bodies(self, name: str, *, depth: int) -> Iterator[str]:
        """The bodies of loops so deep below a computation, 1 for those in itself."""
        for instruction in self.computations.get(name, []):
            for key, called in instruction.called:
                if key == "body" and depth == 1:
                    yield called
                elif key != "condition" and not _is_fused(instruction):
                    yield from self._bodies(called, depth=depth - (key == "body"))

    def _reached(self, name: str) -> frozenset[str]:
        """A computation and all that it calls."""
        if name not in self._reach:
            called = {inner for each in self.computations.get(name, []) for _, inner in each.called}
            self._reach[name] = frozenset({name}).union(*map(self._reached, called))
        return self._reach[name]

    def _mentions(self, name: str, scope: str) -> bool:
        return any(f"/{scope}/" in instruction.place for instruction, _ in self.executed(name, into_fusions=True))

    def _trips(self, loop: Instruction) -> int:
        """Trips of a loop: as noted by the compiler, else the one constant that its condition compares with, else 1."""
        noted = _TRIPS.search(loop.line)
        if noted:
            return int(noted[1])
        conditions = [name for key, name in loop.called if key == "condition"]
        lines = [each.line for name in conditions for each, _ in self.executed(name, into_fusions=True)]
        constants = [int(found[1]) for line in lines if (found := re.search(r"= s32\[\]\S* constant\((\d+)\)", line))]
        return constants[0] if len(constants) == 1 and any("direction=LT" in line for line in lines) else 1


def _bytes(executed: Iterable[tuple[Instruction, int]]) -> int:
    return sum(array.bytes * times for instruction, times in executed for array in instruction.arrays)


def _is_fused(instruction: Instruction) -> bool:
    return instruction.opcode == "fusion"


def _computations(text: str) -> dict[str, list[Instruction]]:
    """Name of every computation -> its instructions; the entry's name is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            current = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif match := _INSTRUCTION.match(stripped := line.strip()):
            kind, rest = _split_type(stripped[match.end() :])
            opcode = re.match(r"[\w\-]+", rest)
            if opcode:
                current.append(Instruction(match[1], opcode[0], kind, stripped))
    return found


def _split_type(text: str) -> tuple[str, str]:
    """The type that a text begins with, and what follows it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            return text[:at], text[at + 1 :]
    return text, ""


def _moved(instruction: Instruction, devices: int) -> Moved:
    kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
    sizes = [array.bytes for array in instruction.arrays]
    if started and kind != "all-reduce":  # operands, results, and what an unfinished transfer holds
        sizes = [max(sizes)]
    group = _group(instruction.line, devices)
    return Moved(kind, sum(sizes) * (group if kind == "reduce-scatter" and not started else 1), group)


def _group(line: str, devices: int) -> int:
    """How many devices take part in a collective together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return devices
