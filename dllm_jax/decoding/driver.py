"""The one decoding loop. Decoders differ in what is plugged into it, never in a loop of their own.

    outer loop: while any row is live
      |
      +-- full step: a forward of the canvas (of the prompt, with a
      |   cache that is final), which makes the cache                   run -> predict -> commit -> stop -> advance
      |
      +-- inner loop: while the cache serves a live row
            |
            +-- cached step: a forward of a slice against the cache     run -> predict -> commit -> stop -> advance

| what is decided | by which axis | in |
|---|---|---|
| columns that may be committed, where a row goes next, which forwards only close a block | blocks | `blocks.py` |
| columns that run, keys and values that are kept, when they are made afresh | cache | `caching.py` |
| token and confidence of a column | sampler, noise | `prediction.py`, `sampling.py` |
| what is committed, taken back, written over; when a row is done with its block | policy | `policies/` |
| where a row ends, and whether the rest of it is committed at once | stop | `stopping.py` |
| everything that is written into the state | none: `stepping.step` | `stepping.py` |

`decode` runs a batch from its prompts to its end. For `refilling.py` a loop ends as soon as enough rows are done, to go
on with new prompts in their slots: between two trips of the outer loop, where caches are made afresh anyway; or, with a
cache that lasts as long as its row, after any step.

Every loop's condition reads two elements of the carry, the live rows and the count of forwards. The count bounds the
loop; and with one element alone XLA's trip-count analysis on TPU follows it through the whole body without remembering
where it has been: two layers were not compiled after 15 minutes, and are in 12 seconds so.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.engine import Carry, Engine
from dllm_jax.decoding.policies.base import reported
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stepping import cached_step, full_step
from dllm_jax.models.cache import Cache, of_rows, widened


class Batch(NamedTuple):
    """What the outer loop carries."""

    carry: Carry
    cache: Cache | None  # one that lasts as long as its row, if the loop may end before


@jax.jit
def decode(engine: Engine, state: DecodeState) -> DecodeState:
    """Runs a batch to its end: the whole generation as one compiled program."""
    state, policy_state = run(engine, Batch(engine.start(state), None)).carry
    return dataclasses.replace(state, log=reported(policy_state))


def run(engine: Engine, batch: Batch, *, fewest: Int[Array, ""] | None = None) -> Batch:
    """The loop.

    Args:
        engine: the decode's parts.
        batch: to go on with.
        fewest: it ends when no more rows than these are live; None: when none is.
    """

    def more(batch: Batch) -> Bool[Array, ""]:
        return engine.unfinished(batch.carry.state, batch.carry.state.live_B, fewest=fewest)

    def run_on(geometry: Geometry) -> Callable[[Batch], Batch]:
        return lambda batch: _trip(engine, batch, geometry, fewest=fewest)

    def trip(batch: Batch) -> Batch:
        state = batch.carry.state
        end = jnp.max(jnp.where(state.live_B, state.end_B, 0))
        shortest = jnp.sum(jnp.array([geometry.length for geometry in engine.canvases]) >= end) - 1
        return jax.lax.switch(shortest, [run_on(geometry) for geometry in engine.canvases], batch)

    return jax.lax.while_loop(more, trip, batch)


def _trip(engine: Engine, batch: Batch, geometry: Geometry, *, fewest: Int[Array, ""] | None) -> Batch:
    """A trip of the outer loop: a full step, then cached steps until the cache serves no live row any more."""
    stale_B = engine.cache.stale(batch.carry.state)
    carry, cache = full_step(engine, batch.carry, length=engine.cache.full_columns(geometry))
    widths = engine.cache.widths(geometry)
    if not widths:
        return Batch(carry, None)
    cache = widened(cache, columns=engine.geometry.columns)
    lasting = batch.cache is not None
    if batch.cache is not None:
        cache = of_rows(engine.paired(stale_B), cache, batch.cache)

    def serves(state: DecodeState) -> Bool[Array, ""]:
        on = engine.unfinished(state, engine.served(state))
        return on & engine.unfinished(state, state.live_B, fewest=fewest) if lasting else on

    def cached_steps(place: int) -> Callable[[Carry, Cache], tuple[Carry, Cache]]:
        """Steps of one width, while it is the narrowest that will do."""

        def more(loop: tuple[Carry, Cache]) -> Bool[Array, ""]:
            state = loop[0].state
            return serves(state) & (engine.narrowest(state, widths) == place)

        def body(loop: tuple[Carry, Cache]) -> tuple[Carry, Cache]:
            return cached_step(engine, *loop, width=widths[place])

        return lambda *loop: jax.lax.while_loop(more, body, loop)

    if len(widths) == 1:
        carry, cache = cached_steps(0)(carry, cache)
        return Batch(carry, cache if lasting else None)
    if engine.cache.keeps_writes:
        every_width = [cached_steps(place) for place in range(len(widths))]
        carry, cache = jax.lax.while_loop(
            lambda loop: serves(loop[0].state),
            lambda loop: jax.lax.switch(engine.narrowest(loop[0].state, widths), every_width, *loop),
            (carry, cache),
        )
        return Batch(carry, cache if lasting else None)

    def narrowing(carry: Carry) -> Carry:
        # Steps run, and write, all that they see behind the block's start: at every width they begin with `cache`.
        without_cache = [lambda *loop, place=place: cached_steps(place)(*loop)[0] for place in range(len(widths))]
        return jax.lax.switch(engine.narrowest(carry.state, widths), without_cache, carry, cache)

    return Batch(jax.lax.while_loop(lambda carry: serves(carry.state), narrowing, carry), None)
