"""Layers shared by every model family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Shape letters: B batch, T queries, S keys, D model width, K key/value heads, G query heads per key/value head,
H head width, F hidden width of the MLP, V vocabulary.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.models.cache import LayerCache, write

CUDNN_LENGTH_MULTIPLE = 64


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: nnx.Initializer, dtype: jnp.dtype
) -> nnx.Param:
    """One parameter with its shape, initialiser and the logical name of every axis (see `dllm_jax.mesh`)."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array in float32, or in float64 if it already is: the precision of norms, rotations and softmax."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to the compute dtype, then times a learned weight."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.scale = parameter(rngs, (dim,), ("norm",), nnx.initializers.ones, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalises the last axis."""
        x_wide = wide(x)
        normed = x_wide * jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...][None, None, :]


def rotate(x: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], *, theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding of the rotate-half form, computed in float32.

    Args:
        x: queries or keys.
        positions_BT: position of every token in its own row (0 = first real token; padding may hold anything).
        theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    x_wide = wide(x)
    frequency_h = theta ** (-jnp.arange(half, dtype=x_wide.dtype) / half)
    angle = positions_BT.astype(x_wide.dtype)[:, :, None, None] * frequency_h[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x_wide[..., :half], x_wide[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "B 1 #T S"],
    kernel: str,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; the one place that chooses a kernel.

    Args:
        q: queries, N = K * G heads, head n reads key/value head n // G.
        k: keys, rotated.
        v: values.
        mask: True where a query may look at a key.
        kernel: "xla" anywhere; "cudnn" on NVIDIA GPUs in 16 bits, for lengths it accepts (others fall back to XLA);
            "xla_wide" computes in float32, where float16 products cannot be summed in float32 (CPU, TPU).
            A TPU kernel would be another name here.
    """
    if kernel == "xla_wide":
        return attend(wide(q), wide(k), wide(v), mask=mask, kernel="xla").astype(q.dtype)
    batch, queries, _, head_dim = q.shape
    keys = k.shape[1]
    fits_cudnn = queries % CUDNN_LENGTH_MULTIPLE == 0 and keys % CUDNN_LENGTH_MULTIPLE == 0 and head_dim % 8 == 0
    implementation: Literal["cudnn", "xla"] = "xla"
    if kernel == "cudnn" and fits_cudnn:
        implementation, mask = "cudnn", jnp.broadcast_to(mask, (batch, 1, queries, keys))  # it takes whole masks only
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    q, k and v of one key/value head lie side by side in `qkv` [D, K, G + 2, H], so that a split over K shards all three
    without moving anything between devices.
    """

    def __init__(
        self, dim: int, *, heads: int, kv_heads: int, head_dim: int, theta: float, bias: bool, kernel: str,
        dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.groups = heads // kv_heads
        self.theta, self.kernel = theta, kernel
        init = nnx.initializers.normal(0.02)
        qkv_shape = (kv_heads, self.groups + 2, head_dim)
        qkv_axes = ("kv_heads", "qkv", "head_dim")
        self.qkv = parameter(rngs, (dim, *qkv_shape), ("embed", *qkv_axes), init, dtype)
        self.qkv_bias = parameter(rngs, qkv_shape, qkv_axes, nnx.initializers.zeros, dtype) if bias else None
        self.out = parameter(
            rngs, (kv_heads, self.groups, head_dim, dim), ("kv_heads", "qkv", "head_dim", "embed"), init, dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        mask: Bool[Array, "B 1 #T S"],
        *,
        cache: LayerCache | None,
        start: Int[Array, ""] | Int[Array, "B"] | None,
        kept_BT: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attends to the tokens themselves, or to a cache in which their keys and values were written at `start`."""
        qkv = jnp.einsum("btd,dkgh->btkgh", x, self.qkv[...])
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...][None, None]
        q, k, v = qkv[..., : self.groups, :], qkv[..., self.groups, :], qkv[..., self.groups + 1, :]
        batch, queries, kv_heads, groups, head_dim = q.shape
        q = rotate(q.reshape(batch, queries, kv_heads * groups, head_dim), positions_BT, theta=self.theta)
        own = LayerCache(k=rotate(k, positions_BT, theta=self.theta), v=v)
        seen = own if cache is None else write(cache, own, start, kept_BT=kept_BT)
        heads = attend(q, seen.k, seen.v, mask=mask, kernel=self.kernel).reshape(
            batch, queries, kv_heads, groups, head_dim
        )
        return jnp.einsum("btkgh,kghd->btd", heads, self.out[...]), seen


class SwiGLU(nnx.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up stored together as [D, 2, F]."""

    def __init__(self, dim: int, *, hidden_dim: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.gate_up = parameter(rngs, (dim, 2, hidden_dim), ("embed", "gate_up", "mlp"), init, dtype)
        self.down = parameter(rngs, (hidden_dim, dim), ("mlp", "embed"), init, dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the gated MLP to every position."""
        gate_up = jnp.einsum("btd,dcf->btcf", x, self.gate_up[...])
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1], self.down[...])
