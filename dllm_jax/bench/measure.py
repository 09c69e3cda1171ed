"""Times the steps of a configuration and its whole decode, with the engine that decodes."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from dllm_jax.bench.cost import Cost, forward_cost, weights_cost
from dllm_jax.bench.loops import time_loop
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.engine import Carry, Engine
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.base import Commit, Policy, Sizes, View, Wants
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stepping import cached_step, full_step
from dllm_jax.memory import check_fits, plan_bytes
from dllm_jax.mesh import batch_multiple
from dllm_jax.models.cache import Cache, widened
from dllm_jax.models.model import Model
from dllm_jax.settings import BenchSettings

Prompts = Sequence[Sequence[int]]


@struct.dataclass
class Endless(Policy):
    """A policy at work in a block that its rows never leave: every step of a loop costs what a real one does."""

    policy: Policy

    @property
    def wants(self) -> Wants:
        """What the policy does."""
        return self.policy.wants

    def most_forwards(self, geometry: Geometry) -> int:
        """More than any loop here runs."""
        return 2**30

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Any:
        """The policy's own."""
        return self.policy.init(state, geometry, sizes)

    def commit(self, policy_state: Any, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The policy's commits, without leaving the block or ending the row."""
        commit = self.policy.commit(policy_state, prediction, view, noise)
        return commit._replace(leave_B=jnp.zeros_like(commit.leave_B), end_B=None)


class StepKind(NamedTuple):
    """A forward and its commit, as one configuration runs them."""

    name: str  # "full": the whole canvas; "cached": against the keys and values of the rest
    program: Callable[[Engine, DecodeState, Int[Array, ""]], DecodeState]  # so many of them in a loop
    block: int  # that the rows are in
    columns: int  # that the forward runs
    keys: int  # columns that are attended to


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTiming:
    """How long one kind of step takes."""

    step: str  # name of the kind
    batch_size: int
    canvas_length: int
    columns: int  # that the forward runs
    seconds: float  # median
    seconds_range: tuple[float, float]  # fastest and slowest repeat
    compile_seconds: float
    peak_memory_bytes: int
    cost: Cost  # per device


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """A batch decoded to its end."""

    batch_size: int
    canvas_length: int
    seconds: float  # median, from the first forward to the result on the host
    seconds_range: tuple[float, float]
    compile_seconds: float
    peak_memory_bytes: int
    num_tokens: int  # to the end of text, all rows
    canvas_tokens: int  # all rows
    nfe_mean: float  # forwards of a row
    iterations: int  # forwards of the batch
    columns: int  # that those forwards ran, per row


def time_steps(decoder: Decoder, prompts: Prompts, *, bench: BenchSettings) -> list[StepTiming]:
    """Times every kind of step that a configuration runs.

    Args:
        decoder: model and configuration.
        prompts: one batch.
        bench: repeats and trips of the loop.
    """
    engine, state = _begin(decoder, prompts)
    never = engine.stop and engine.stop.never()
    engine = dataclasses.replace(engine, policy=Endless(engine.policy), stop=never, block_limit=None)
    return [_time_step(decoder, kind, engine=engine, state=state, bench=bench) for kind in step_kinds(engine)]


def _time_step(
    decoder: Decoder, kind: StepKind, *, engine: Engine, state: DecodeState, bench: BenchSettings
) -> StepTiming:
    mesh = decoder.model.mesh
    start = engine.geometry.prompt_length + kind.block * engine.geometry.block_length
    state = dataclasses.replace(state, block_end_B=jnp.full_like(state.block_end_B, start))  # where the first begins

    def check(compiled: jax.stages.Compiled) -> None:
        check_fits(plan_bytes(compiled), mesh, field="bench.batch_sizes", got=decoder.config.decode.batch_size)

    with decoder.computing():
        timing = time_loop(kind.program, (engine, state), trips=bench.steps, repeats=bench.repeats, check=check)
    geometry = engine.geometry
    rows = state.tokens_BL.shape[0] // batch_multiple(mesh)
    return StepTiming(
        step=kind.name,
        batch_size=decoder.config.decode.batch_size,
        canvas_length=geometry.length,
        columns=kind.columns,
        seconds=timing.median,
        seconds_range=(timing.fastest, timing.slowest),
        compile_seconds=timing.compile_seconds,
        peak_memory_bytes=peak_memory(timing.compiled),
        cost=step_cost(decoder.model, engine, kind, rows=rows),
    )


def step_cost(model: Model, engine: Engine, kind: StepKind, *, rows: int, weights_only: bool = False) -> Cost:
    """The cost of a step on every device; a policy's own model is not counted.

    Args:
        model: that decodes.
        engine: its parts.
        kind: of step.
        rows: of the batch on every device.
        weights_only: what reading the weights for them costs.
    """
    geometry = engine.geometry
    slots = geometry.gen_length if engine.looks_everywhere else engine.blocks.width(geometry)
    rows *= 2 if engine.sampler.guided else 1
    config, itemsize = model.config, model.dtype.itemsize
    if weights_only:
        cost = weights_cost(config, tokens=rows * kind.columns, itemsize=itemsize)
    else:
        cost = forward_cost(config, rows=rows, columns=kind.columns, keys=kind.keys, slots=slots, itemsize=itemsize)
    return cost.split(model.mesh.shape["tensor"])


def step_kinds(engine: Engine) -> list[StepKind]:
    """The full step, and with a cache the cached steps of its narrowest and its widest slice."""
    geometry, widths = engine.geometry, engine.cache.widths(engine.geometry)
    full = engine.cache.full_columns(geometry)
    kinds = [StepKind("full", full_steps, block=0, columns=full, keys=full)]
    for width in sorted({min(widths), max(widths)} if widths else ()):
        program, block = cached_steps(width), max(geometry.gen_length - width, 0) // geometry.block_length
        kinds.append(StepKind("cached", program, block=block, columns=width, keys=geometry.columns))
    return kinds


def full_steps(engine: Engine, state: DecodeState, count: Int[Array, ""]) -> DecodeState:
    """`count` full forwards."""
    length = engine.cache.full_columns(engine.geometry)
    return jax.lax.fori_loop(
        0, count, lambda _, carry: full_step(engine, carry, length=length)[0], engine.start(state)
    ).state


def cached_steps(width: int) -> Callable[[Engine, DecodeState, Int[Array, ""]], DecodeState]:
    """The program of a full forward, and `count` cached ones of this width in the block that the rows are in."""

    def program(engine: Engine, state: DecodeState, count: Int[Array, ""]) -> DecodeState:
        geometry = engine.geometry
        carry, cache = full_step(engine, engine.start(state), length=engine.cache.full_columns(geometry))
        cache = widened(cache, columns=geometry.columns)

        def body(_: Int[Array, ""], loop: tuple[Carry, Cache]) -> tuple[Carry, Cache]:
            return cached_step(engine, *loop, width=width)

        return jax.lax.fori_loop(0, count, body, (carry, cache))[0].state

    return program


def time_decode(decoder: Decoder, prompts: Prompts, *, repeats: int) -> DecodeTiming:
    """Times the whole decode of a batch, behind one for warming up.

    Args:
        decoder: model and configuration.
        prompts: one batch.
        repeats: how often.
    """
    begin = time.perf_counter()
    engine = decoder.engine(max(map(len, prompts)))
    with decoder.computing():
        compiled = decoder.program(engine, rows=len(prompts))  # the decoder finds it
    compile_seconds = time.perf_counter() - begin
    results = [decoder(prompts) for _ in range(repeats + 1)][1:]
    seconds, result = [result.timing.decode_seconds for result in results], results[0]
    return DecodeTiming(
        batch_size=len(prompts),
        canvas_length=engine.geometry.length,
        seconds=statistics.median(seconds),
        seconds_range=(min(seconds), max(seconds)),
        compile_seconds=compile_seconds,
        peak_memory_bytes=peak_memory(compiled),
        num_tokens=int(result.num_tokens_B.sum()),
        canvas_tokens=result.tokens_BG.size,
        nfe_mean=float(result.nfe_B.mean()),
        iterations=result.iterations,
        columns=result.columns,
    )


def _begin(decoder: Decoder, prompts: Prompts) -> tuple[Engine, DecodeState]:
    engine = decoder.engine(max(map(len, prompts)))
    return engine, decoder.start(prompts, range(len(prompts)), engine.geometry)


def peak_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes on one device: the most in use so far if the device tells, else what the program was planned with."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    plan: Any = compiled.memory_analysis()
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return kept + plan.temp_size_in_bytes


def memory_source() -> str:
    """Where the numbers of `peak_memory` come from."""
    stats = jax.local_devices()[0].memory_stats() or {}
    told = "device.memory_stats(), most in use since the process started"
    return told if "peak_bytes_in_use" in stats else "compiled.memory_analysis(), of the program"
