"""Weights in 8 bits: integers with one scale per output channel, the activations as they are.

A library was looked at first: qwix rewrites a module whose weights are all there, ours are quantized one by one as they
are read, in the fused shapes and on the devices where they stay.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

FORMATS = ("", "int8")  # of `model.quantize`
LARGEST = 127  # -128 is left out: values and their negatives round alike


def quantized(matrix: Float[Array, "..."], *, axes: tuple[int, ...]) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """The nearest integers and their scale: matrix ~ integers * scale.

    Args:
        matrix: of any dtype; computed in float32.
        axes: those that are summed over when it is used: each of the other axes' channels has a scale of its own.

    Returns:
        int8 values in the matrix's shape, and float32 scales in the shape of its other axes.
    """
    matrix = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(matrix), axis=axes, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(matrix / scale).astype(jnp.int8), jax.lax.squeeze(scale, axes)
