"""What the device can do at most, measured in the same run: memory bandwidth and the rate of matrix products."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.bench.cost import Cost
from dllm_jax.bench.loops import time_loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the probes are: memory well beyond the caches, products well beyond the overheads."""

    bytes: int  # that a trip reads
    matmul: int  # rows and columns of the square matrices
    trips: int


CPU_SIZES = Sizes(bytes=2**28, matmul=1024, trips=4)
ACCELERATOR_SIZES = Sizes(bytes=2**30, matmul=8192, trips=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Highest rates of one device."""

    read_bytes_per_second: float  # a matrix times a vector, in the model's dtype
    copy_bytes_per_second: float  # bytes read and bytes written together
    matmul_flops_per_second: float  # in the model's dtype and precision

    def floor_seconds(self, cost: Cost) -> float:
        """The least time the work can take: whichever of memory and arithmetic is slower at its ceiling."""
        bandwidth = max(self.read_bytes_per_second, self.copy_bytes_per_second)
        return max(cost.bytes / bandwidth, cost.flops / self.matmul_flops_per_second)


def measure_ceilings(device: jax.Device, dtype: jnp.dtype, *, repeats: int, sizes: Sizes | None = None) -> Ceilings:
    """Measures a device.

    Args:
        device: which.
        dtype: of the matrices.
        repeats: of every measurement; the median counts.
        sizes: of the probes; default by platform.
    """
    if sizes is None:
        sizes = CPU_SIZES if device.platform == "cpu" else ACCELERATOR_SIZES
    side = math.isqrt(sizes.bytes // dtype.itemsize)
    matrix = jax.random.normal(jax.random.key(0), (sizes.matmul, sizes.matmul), dtype) / sizes.matmul**0.5

    def seconds(program: Callable[..., Array], *arguments: Array) -> float:
        return time_loop(program, jax.device_put(arguments, device), trips=sizes.trips, repeats=repeats).median

    averaging = jnp.full((side, side), 1 / side, dtype)
    return Ceilings(
        read_bytes_per_second=averaging.nbytes / seconds(_multiply, averaging, jnp.ones(side, dtype)),
        copy_bytes_per_second=2 * sizes.bytes / seconds(_copy, jnp.zeros(sizes.bytes // 4, jnp.int32)),
        matmul_flops_per_second=2 * sizes.matmul**3 / seconds(_multiply, matrix, matrix),
    )


def _multiply(factor: Float[Array, "N N"], x: Float[Array, "N *M"], count: Int[Array, ""]) -> Float[Array, "N *M"]:
    """A chain of products; with a vector, all there is to do is to read the factor."""
    return jax.lax.fori_loop(0, count, lambda _, x: factor @ x, x)


def _copy(words: Int[Array, "N"], count: Int[Array, ""]) -> Int[Array, "N"]:
    """Reads and writes all words."""
    return jax.lax.fori_loop(0, count, lambda _, x: x + 1, words)
