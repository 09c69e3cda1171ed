"""From any number of prompts to those that are done: batch after batch, or in batches whose slots are refilled."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import hosts
from dllm_jax.decoding.engine import Engine
from dllm_jax.decoding.policies.base import reported
from dllm_jax.decoding.refilling import blank, refill, zeros
from dllm_jax.decoding.state import DecodeResult, Timing
from dllm_jax.memory import placed
from dllm_jax.mesh import batch_shardings
from dllm_jax.settings import refill_share

if TYPE_CHECKING:
    from dllm_jax.decoding.generate import Decoder

FULL_BATCHES = 4  # that are worth a program of their own, for prompts that are all short enough for it


class Finished(NamedTuple):
    """Prompts that are decoded."""

    places: list[int]  # of the prompts in their sequence
    result: DecodeResult  # of them, in that order


def stream(
    decoder: "Decoder",
    prompts: Sequence[Sequence[int]],
    *,
    lengths: Sequence[int] | None,
    rows: Sequence[int] | None,
    halted: Callable[[], bool],
) -> Iterator[Finished]:
    """See `Decoder.stream`."""
    lengths = [len(prompt) for prompt in prompts] if lengths is None else lengths
    rows = range(len(prompts)) if rows is None else rows
    size, share = decoder.config.decode.batch_size, refill_share(decoder.config.decode)
    for places in decoder.batches(lengths) if not share else groups(decoder, lengths):
        if halted():
            return
        if len(places) <= size:
            yield Finished(places, decoder([prompts[i] for i in places], rows=[rows[i] for i in places]))
        else:
            engine = decoder.engine(lengths[places[-1]], in_step=False)
            yield from _refilled(decoder, engine, places, prompts, rows=rows, share=share, halted=halted)


def groups(decoder: "Decoder", lengths: Sequence[int]) -> list[list[int]]:
    """Places of the prompts that share a program, the shortest first.

    Prompts of one bucket are together; with too few for some batches, those of the next one too.
    """
    groups: list[list[int]] = []
    least = FULL_BATCHES * decoder.config.decode.batch_size
    last = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        length = decoder.prompt_length(lengths[place])
        if not groups or (length > last and len(groups[-1]) >= least):
            groups.append([])
        groups[-1].append(place)
        last = length
    return groups


def _refilled(
    decoder: "Decoder",
    engine: Engine,
    places: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    rows: Sequence[int],
    share: float,
    halted: Callable[[], bool],
) -> Iterator[Finished]:
    """Decodes prompts in one batch, whose rows are given to the next of them as they are done.

    Args:
        decoder: whose batch.
        engine: for the longest of the prompts.
        places: of the prompts, in the order in which they begin.
        prompts: the whole sequence.
        rows: of the whole sequence.
        share: of the batch that is done before it is refilled.
        halted: see `Decoder.stream`.
    """
    size, waiting = decoder.config.decode.batch_size, collections.deque(places)
    count = decoder.batch(size)
    enough = max(math.ceil(share * count), 1)
    standing: dict[int, int] = {}  # slot -> place
    with decoder.running():
        spent = decoder.prepare(engine, refill_program, rows=size)
        batch = zeros(blank(engine, decoder.state_shapes(engine.geometry, rows=size), decoder.model.mesh))
    while True:
        begin = time.perf_counter()
        if halted():
            waiting.clear()
        free = [slot for slot in range(count) if slot not in standing]
        new = {slot: waiting.popleft() for slot in free[: len(waiting)]}
        standing |= new
        if not standing:
            return
        fewest = max(len(standing) - enough, 0) if waiting else 0
        with decoder.running():
            if new:
                begun = [prompts[place] for place in new.values()]
                state = decoder.start(begun, [rows[place] for place in new.values()], engine.geometry, slots=[*new])
            turn = jnp.asarray(np.isin(np.arange(count), [*new])), jnp.int32(fewest)
            batch = refill(engine, batch, state, *hosts.place(turn, batch_shardings(turn, decoder.model.mesh)))
            final = hosts.fetch(dataclasses.replace(batch.carry.state, log=reported(batch.carry.policy_state)))
            live_B = np.asarray(final.live_B)
        done = [slot for slot in standing if not live_B[slot]]
        spent += Timing(0.0, time.perf_counter() - begin, 0, 0)
        yield Finished([standing.pop(slot) for slot in done], decoder.result(final, engine.geometry, spent, slots=done))
        spent = Timing(0.0, 0.0, 0, 0)


def refill_program(decoder: "Decoder", engine: Engine, *, rows: int) -> jax.stages.Compiled:
    """Compiles the program of a batch whose slots are refilled; as `Decoder.program`."""
    mesh, state = decoder.model.mesh, decoder.state_shapes(engine.geometry, rows=rows)
    batch = decoder.batch(rows)
    turn = jax.eval_shape(lambda: (jnp.zeros(batch, bool), jnp.int32(0)))
    turn = placed(turn, batch_shardings(turn, mesh))
    return decoder.compiled(engine, refill, blank(engine, state, mesh), state, *turn, batch=batch)
