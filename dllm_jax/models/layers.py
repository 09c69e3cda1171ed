"""Layers shared by every model family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Shape letters: B batch, T queries, S keys, D model width, K key/value heads, G query heads per key/value head,
H head width, F hidden width of the MLP, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.mesh import DECODING, constrain
from dllm_jax.models.attention import Visible, attend
from dllm_jax.models.cache import LayerCache, write


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: nnx.Initializer, dtype: jnp.dtype
) -> nnx.Param:
    """One parameter with its shape, initialiser and the logical name of every axis (see `dllm_jax.mesh`)."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def weight(variable: nnx.Param, beside: Float[Array, "..."] | None = None) -> Array:
    """A parameter where a layer uses it: whole but for its axes over `tensor`.

    Args:
        variable: the parameter, which may be split over `fsdp`.
        beside: what it is multiplied with. The parameter is gathered when that is there: else the compiler would
            gather those of all layers in front of a loop.
    """
    value = variable[...]
    if beside is not None and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1:
        value, _ = jax.lax.optimization_barrier((value, beside))
    return constrain(value, *variable.get_metadata()["logical_axes"], rules=DECODING)


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


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    q, k and v of one key/value head lie side by side in `qkv` [D, K, G + 2, H], so that a split over K shards all three
    without moving anything between devices.
    """

    def __init__(
        self, dim: int, *, kv_heads: int, groups: int, head_dim: int, theta: float, bias: bool, dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.groups = groups
        self.theta = theta
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
        seen: Visible,
        *,
        cache: LayerCache | None,
        start: Int[Array, ""] | Int[Array, "B"] | None,
        kept_BT: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attends to the tokens themselves, or to a cache in which their keys and values were written at `start`."""
        qkv = jnp.einsum("btd,dkgh->btkgh", x, weight(self.qkv, x))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...][None, None]
        qkv = constrain(qkv, "batch", None, "kv_heads", None, None)
        q, k, v = qkv[..., : self.groups, :], qkv[..., self.groups, :], qkv[..., self.groups + 1, :]
        batch, queries, kv_heads, groups, head_dim = q.shape
        q = rotate(q.reshape(batch, queries, kv_heads * groups, head_dim), positions_BT, theta=self.theta)
        own = LayerCache(k=rotate(k, positions_BT, theta=self.theta), v=v)
        keys = own if cache is None else write(cache, own, start, kept_BT=kept_BT)
        heads = attend(q, keys.k, keys.v, seen=seen).reshape(batch, queries, kv_heads, groups, head_dim)
        return jnp.einsum("btkgh,kghd->btd", heads, weight(self.out, heads)), keys


class SwiGLU(nnx.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up stored together as [D, 2, F]."""

    def __init__(self, dim: int, *, hidden_dim: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.gate_up = parameter(rngs, (dim, 2, hidden_dim), ("embed", "gate_up", "mlp"), init, dtype)
        self.down = parameter(rngs, (hidden_dim, dim), ("mlp", "embed"), init, dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the gated MLP to every position."""
        gate_up = constrain(jnp.einsum("btd,dcf->btcf", x, weight(self.gate_up, x)), "batch", None, None, "mlp")
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return jnp.einsum("btf,fd->btd", hidden, weight(self.down, hidden))
