"""What a decode will take, compiled ahead of time from shapes alone: memory, what moves, what is copied, floors."""

import contextlib
import dataclasses
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from dllm_jax.bench.ceilings import measure_ceilings
from dllm_jax.bench.cost import Cost
from dllm_jax.bench.estimate import estimate
from dllm_jax.bench.measure import StepKind, step_cost, step_kinds
from dllm_jax.bench.report import markdown_table
from dllm_jax.checkpoints import layout
from dllm_jax.chips import GPUS, TPUS
from dllm_jax.config import Config
from dllm_jax.decoding import driver
from dllm_jax.decoding.engine import Engine
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.build import companions_of
from dllm_jax.decoding.state import DecodeState
from dllm_jax.errors import UsageError
from dllm_jax.hlo import ArrayType, Moved, Program
from dllm_jax.memory import bytes_per_device, chip, device_bytes
from dllm_jax.mesh import batch_multiple
from dllm_jax.models.model import Model, shape_model
from dllm_jax.placement import Shapes, abstract_mesh, alternative, decode_mesh, footprint, told
from dllm_jax.settings import numbers

PARTS = ("argument_bytes", "temp_bytes", "output_bytes", "code_bytes")
MEASURED_REPEATS = 2  # of the ceilings of a device that is not in the table
_HLO_DTYPES = {"int8": "s8", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
_EXCEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMGT])")  # in the compiler's complaint
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does at most; None: nobody knows."""

    bandwidth: float  # bytes per second from and to memory
    flops: float
    link: float | None  # bytes per second that it sends

    def floor(self, cost: Cost, weights: Cost, moved: Sequence[Moved]) -> tuple[float, str]:
        """The least milliseconds of a step, and what they are spent on.

        Args:
            cost: of the step.
            weights: of reading the weights alone.
            moved: its collectives.
        """
        memory = {
            "weights": weights.bytes / self.bandwidth,
            "keys and values": (cost.bytes - weights.bytes) / self.bandwidth,
        }
        links = sum(each.sent for each in moved) / self.link if self.link else 0.0
        seconds = {max(memory, key=lambda name: memory[name]): sum(memory.values())} | {
            "matrix products": cost.flops / self.flops,
            "links": links,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        return seconds[bound] * 1e3, bound


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The TPUs of a topology, which need not be here.

    Args:
        name: generation and shape, such as v5e:2x4 or v5p:2x2x1.

    Raises:
        UsageError: there is no such topology.
    """
    try:
        if name.partition(":")[0] not in TPUS:
            raise ValueError("unknown generation")
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return topologies.get_topology_desc(name, platform="tpu").devices
        # smaller than a host of several chips
        return topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=(1, 1, 1)).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"plan.topology: expected one of {', '.join(TPUS)} with its shape, like v5e:2x4, v5e:1x1 or v5p:2x2x1, "
            f"or one of {', '.join(GPUS)}, got {name!r} ({reason})"
        ) from None


def plan(config: Config) -> dict[str, Any]:
    """Compiles the program of a configuration for every `plan.prompt_length`.

    Args:
        config: what would be decoded with, and `plan` for what machine.

    Returns:
        What goes to output.path: `topology`, `chip`, `devices`, `mesh`, `fits` (None if the memory is not known),
        `memory_per_device`, `usable_per_device` (by programs), `platform`, `estimated` (see `bench/estimate.py`) and
        `programs`, one entry per length. Bytes and counts are of one device, those in `loops` of one step. Of a program
        that the compiler refused for its size only what it told is known, the rest is None.

    Raises:
        UsageError: model, topology, mesh or settings do not work out.
    """
    if config.plan.topology in GPUS:
        return estimate(config)
    devices = topology_devices(config.plan.topology) if config.plan.topology else jax.devices()
    lengths = numbers("plan.prompt_length", config.plan.prompt_length)
    mesh = decode_mesh(config, prompt_length=max(lengths), devices=devices, must_fit=False)
    decoder = _decoder(config, mesh)
    rates = rates_of(devices, decoder.model.dtype)
    programs = [_program(decoder, length, rates) for length in _within(lengths, decoder.longest_prompt)]
    return outcome(programs, devices, mesh, topology=config.plan.topology)


def rates_of(devices: Sequence[jax.Device], dtype: np.dtype) -> Rates:
    """What a device does at most, by the table of chips, else measured."""
    if figures := chip(devices):
        return Rates(figures.bandwidth, figures.flops, figures.link)
    measured = measure_ceilings(devices[0], dtype, repeats=MEASURED_REPEATS)
    bandwidth = max(measured.read_bytes_per_second, measured.copy_bytes_per_second)
    return Rates(bandwidth, measured.matmul_flops_per_second, None)


def outcome(
    programs: Sequence[Mapping[str, Any]], devices: Sequence[jax.Device], mesh: Mesh, *, topology: str
) -> dict[str, Any]:
    """What goes to output.path, from the entries of the programs; see `plan`."""
    figures, usable = chip(devices), device_bytes(devices)
    return {
        "topology": topology,
        "chip": figures.name if figures else devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "fits": None if usable is None else all(_total(program) <= usable for program in programs),
        "memory_per_device": figures.memory if figures and topology else usable,
        "usable_per_device": usable,
        "platform": devices[0].platform,
        "estimated": False,
        "programs": programs,
    }


def _decoder(config: Config, mesh: Mesh) -> Decoder:
    """A decoder whose models are shapes; it refuses what the real one would."""
    shapes = Shapes.of(config, platform=mesh.devices.flat[0].platform)
    model = shape_model(shapes.model, dtype=shapes.dtype, mesh=mesh)
    others: dict[str, Any] = {
        name: shape_model(each, dtype=shapes.dtype, mesh=mesh) for name, each in shapes.companions.items()
    }
    small = {each.name: each.open(config, mesh) for each in companions_of(config) if each.name not in others}
    return Decoder(model, config, **others, **small)


def program_arguments(decoder: Decoder, engine: Engine) -> tuple[Engine, DecodeState]:
    """The arguments of a decoder's program, as shapes on its mesh."""
    everywhere = NamedSharding(decoder.model.mesh, PartitionSpec())

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        known = isinstance(x, jax.ShapeDtypeStruct)
        return x if known else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    state = decoder.state_shapes(engine.geometry, rows=decoder.config.decode.batch_size)
    return jax.tree.map(shape, (engine, state))


def _within(lengths: Sequence[int], longest: int) -> list[int]:
    """The lengths that the model allows, and the longest of those instead of longer ones, which is told."""
    if longest < 1:
        raise UsageError(f"decode.gen_length: expected room for a prompt, got {-longest + 1} tokens too many")
    if max(lengths) > longest:
        note = f"plan.prompt_length: {longest} instead of {max(lengths)}, the most with this decode.gen_length"
        print(note, file=sys.stderr)
    return list(dict.fromkeys(min(length, longest) for length in lengths))


def _program(decoder: Decoder, length: int, rates: Rates) -> dict[str, Any]:
    """The entry of one program."""
    engine = decoder.engine(length)
    arguments = program_arguments(decoder, engine)
    with decoder.computing():
        entry, program = compiled(driver.decode, arguments)
    loops = _loops(decoder, engine, program, rates) if program else {}
    return {"prompt_length": length, **entry, "loops": loops}


def compiled(function: Any, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], Program | None]:
    """Compiles a program and tells the seconds and its bytes on a device, and what it does.

    Args:
        function: jitted.
        arguments: shapes on a mesh.

    Returns:
        `compile_seconds` and `PARTS`; of a program that the compiler refused for its size only what it told. The
        program, if it was not refused.
    """
    begin = time.perf_counter()
    try:
        made = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        exceeded = _EXCEEDED.search(str(error))
        temporaries = int(float(exceeded[1]) * _UNITS[exceeded[2]]) if exceeded else None
        held = bytes_per_device(arguments, jax.tree.map(lambda x: x.sharding, arguments))
        sizes: tuple[int | None, ...] = (held, temporaries, None, None)
        program = None
    else:
        memory: Any = made.memory_analysis()
        sizes = (
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )
        program = Program(str(made.as_text()))
    seconds = time.perf_counter() - begin
    return {"compile_seconds": seconds, **dict(zip(PARTS, sizes, strict=True))}, program


def _loops(decoder: Decoder, engine: Engine, program: Program, rates: Rates) -> dict[str, Any]:
    """The entries of a program's loops: that of full steps, and that of the widest cached steps."""
    kinds = step_kinds(engine)
    inner = program.loop_bodies("cached_step")
    (outer,) = program.loop_bodies("full_step")
    in_full, in_front = {"name": outer, "without": inner}, {"name": "ENTRY", "without": [outer]}
    entries = {"full": _loop(decoder, engine, kinds[0], program, [in_full], rates, in_front=[in_front])}
    if inner:
        widest = max(inner, key=program.bytes_made)
        entries["cached"] = _loop(decoder, engine, kinds[-1], program, [{"name": widest}], rates)
    return entries


def _loop(
    decoder: Decoder,
    engine: Engine,
    kind: StepKind,
    program: Program,
    regions: list[dict[str, Any]],
    rates: Rates,
    *,
    in_front: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The entry of one loop.

    Args:
        decoder: of which the program is.
        engine: its parts.
        kind: of the loop's steps.
        program: parsed.
        regions: arguments of `Program.moved` that make up a step.
        rates: of the device.
        in_front: arguments for what runs once, in front of the loop, where weights may be copied.
    """
    model, mesh = decoder.model, decoder.model.mesh
    moved = [each for region in regions for each in program.moved(**region)]
    rows = decoder.batch(1) // batch_multiple(mesh)
    cost, weights = (step_cost(model, engine, kind, rows=rows, weights_only=only) for only in (False, True))
    floor_ms, bound_by = rates.floor(cost, weights, moved)
    matrices = [array for part in decoder.models for array in _matrices(part)]
    return {
        "collectives": collectives(moved),
        "weight_copies": sum(len(program.copies(arrays=matrices, **region)) for region in [*regions, *in_front]),
        "cache_copies": sum(len(program.copies(arrays=_caches(decoder, engine, rows), **region)) for region in regions),
        "floor_ms": floor_ms,
        "bound_by": bound_by,
    }


def collectives(moved: Sequence[Moved]) -> dict[str, dict[str, int]]:
    """How many there are of every kind, and the bytes of all of them."""
    kinds: dict[str, dict[str, int]] = {}
    for each in moved:
        entry = kinds.setdefault(each.kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += each.bytes
    return kinds


def _matrices(model: Model) -> list[ArrayType]:
    """The parts of a model's matrices on one device; of stacked ones also one layer."""
    parts = []
    for name, leaf in layout.flatten(model.params).items():
        kind = name.rpartition(".")[2]
        if kind not in (*layout.INPUTS, "embedding"):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape)
        one = shape[1:] if model.config.stacked and name.startswith(("layers.", "first.")) else shape
        forms = {shape, one} | ({(math.prod(shape[:-2]), *shape[-2:])} if kind in layout.EXPERTS else set())
        dtypes = {leaf.dtype.name, model.dtype.name}  # a converted copy is a copy too
        parts += [ArrayType(_HLO_DTYPES[dtype], form) for form in forms for dtype in dtypes]
    return parts


def _caches(decoder: Decoder, engine: Engine, rows: int) -> list[ArrayType]:
    """The keys or values of a layer, and of all, on one device, with the canvas's columns and with the cache's."""
    config, tensor = decoder.model.config, decoder.model.mesh.shape["tensor"]
    heads = config.stored_kv_heads // tensor
    columns = {engine.cache.full_columns(engine.geometry), engine.geometry.columns}
    rows *= 2 if engine.sampler.guided else 1
    dtype = _HLO_DTYPES[decoder.model.dtype.name]
    layers = [(), (config.num_layers,)] if config.stacked else [()]
    return [ArrayType(dtype, (*stack, rows, width, heads, config.head_dim)) for width in columns for stack in layers]


def _total(program: Mapping[str, Any]) -> float:
    """Bytes that a program takes on a device; those of one that was refused for its size are endless."""
    sizes = [program[part] for part in PARTS]
    return float("inf") if None in sizes else sum(sizes)


def _name(part: str) -> str:
    return part.removesuffix("_bytes")


def obstacle(config: Config, results: Mapping[str, Any]) -> str:
    """Why the plan does not fit and what would, in a line."""
    usable = results["usable_per_device"] or 0
    worst = max(results["programs"], key=_total)
    parts = [f"{_name(part)} {told(worst[part])}" for part in PARTS if worst[part] is not None]
    total = "more than there is" if math.isinf(_total(worst)) else told(_total(worst))
    sizes, length = results["mesh"], worst["prompt_length"]
    asked = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=sizes["tensor"]))
    shapes = Shapes.of(config, platform=results["platform"])
    estimated = footprint(asked, shapes, abstract_mesh(**sizes), prompt_length=length).total
    # The estimates of what would fit are scaled to what the compiler said of what does not.
    known = max(sum(worst[part] or 0 for part in PARTS), usable + 1)
    other = alternative(asked, shapes, int(usable * estimated / known), prompt_length=length)
    return (
        f"does not fit: with prompts of {length} tokens every device needs {total} ({', '.join(parts)}) and has "
        f"{told(usable)}; {other}"
    )


def tables(results: Mapping[str, Any], *, length: str = "prompt_length") -> list[Table]:
    """Memory and loops for a reader.

    Args:
        results: from `plan`.
        length: the field of a program that tells it from the others.
    """
    first = length.removesuffix("_length")
    memory = markdown_table(first, "compile s", *map(_name, PARTS), "all", "of")
    loops = markdown_table(
        first, "step", "collectives", "MiB moved", "weight copies", "cache copies", "floor ms", "bound by"
    )
    there = results["memory_per_device"]
    for program in results["programs"]:
        sizes = ["-" if program[part] is None else told(program[part]) for part in PARTS]
        total, seconds = _total(program), program["compile_seconds"]
        memory.add_row(
            str(program[length]),
            "-" if seconds is None else f"{seconds:.1f}",
            *sizes,
            "too much" if math.isinf(total) else told(total),
            "-" if there is None else told(there),
        )
        for step, loop in program["loops"].items():
            moved = loop["collectives"]
            kinds = ", ".join(f"{entry['count']} {kind}" for kind, entry in moved.items()) or "none"
            loops.add_row(
                str(program[length]),
                step,
                kinds,
                f"{sum(entry['bytes'] for entry in moved.values()) / 2**20:.1f}",
                str(loop.get("weight_copies", "-")),
                str(loop.get("cache_copies", "-")),
                f"{loop['floor_ms']:.2f}",
                loop["bound_by"],
            )
    return [memory, loops]


def summary(results: Mapping[str, Any]) -> str:
    """For what was compiled and whether it fits, in a line."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in results["mesh"].items())
    fits = {True: "fits", False: "does not fit", None: "how much memory there is is not known"}[results["fits"]]
    place = f"{results['devices']} x {results['chip']}{', estimated' if results['estimated'] else ''}"
    return f"mesh {mesh} of {results['topology'] or 'the devices here'} ({place}): {fits}"
