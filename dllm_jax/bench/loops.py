"""Times one trip of a compiled loop, the way a decode runs its steps: on the device, the host out of the way."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LoopTiming(NamedTuple):
    """Seconds of one trip, over all repeats."""

    median: float
    fastest: float
    slowest: float
    compile_seconds: float
    compiled: jax.stages.Compiled  # the program


def time_loop(
    program: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    trips: int,
    repeats: int,
    check: Callable[[jax.stages.Compiled], None] = lambda compiled: None,
) -> LoopTiming:
    """Times a program that ends with a loop.

    A repeat runs the program with `trips` trips and with none, and a trip takes the difference over `trips`: dispatch,
    transfers and what stands before the loop cancel out. The count is an argument, so both runs are the same compiled
    program and the compiler cannot unroll the loop.

    Args:
        program: (*arguments, count: int32 scalar) -> arrays that depend on the last trip; not yet compiled.
        arguments: in front of the count.
        trips: enough for a trip to stand out from the noise.
        repeats: measurements, behind a run for warming up.
        check: called with the compiled program before it runs; may refuse it.
    """
    begin = time.perf_counter()
    compiled = jax.jit(program).lower(*arguments, jnp.int32(trips)).compile()
    compile_seconds = time.perf_counter() - begin
    check(compiled)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments, jnp.int32(count)))
        return time.perf_counter() - begin

    seconds(trips)
    each = [(seconds(trips) - seconds(0)) / trips for _ in range(repeats)]
    return LoopTiming(statistics.median(each), min(each), max(each), compile_seconds, compiled)
