"""Layers shared by every model family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Shape letters: B batch, T queries, S keys, D model width, K key/value heads, G query heads per key/value head,
H head width, F hidden width of the MLP, V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.mesh import DECODING, constrain
from dllm_jax.models.attention import Looks, Visible, Watch, attend, look
from dllm_jax.models.cache import LayerCache, write
from dllm_jax.models.quantize import quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How the parameters of a module are made and stored.

    Attributes:
        dtype: of all but quantized matrices.
        rngs: for the initial values; None: all are 0, for who wants shapes alone.
        layers: of which every parameter holds all in one array, [layers, ...]; 0: of one.
        quantize: "int8": matrices are integers with a float32 scale for every output channel; "": they are not.
    """

    dtype: jnp.dtype
    rngs: nnx.Rngs | None
    layers: int = 0
    quantize: str = ""

    def parameter(self, sizes: Mapping[str, int], init: nnx.Initializer) -> nnx.Param:
        """One parameter.

        Args:
            sizes: of its axes, by their logical names (see `dllm_jax.mesh`).
            init: makes its first values.
        """
        if self.layers:
            sizes = {"layers": self.layers, **sizes}
        shape = tuple(sizes.values())
        first = init(self.rngs.params(), shape, self.dtype) if self.rngs else jnp.zeros(shape, self.dtype)
        return nnx.Param(first, logical_axes=tuple(sizes))

    def matrix(self, sizes: Mapping[str, int], *, inputs: Collection[str]) -> tuple[nnx.Param, nnx.Param | None]:
        """A matrix, and its scale if it is quantized.

        Args:
            sizes: as in `parameter`.
            inputs: the axes that are summed over where it is used; the others are the output channels.
        """
        param = self.parameter(sizes, nnx.initializers.normal(0.02))
        if not self.quantize:
            return param, None
        names = param.get_metadata()["logical_axes"]
        values, scale = quantized(param[...], axes=tuple(names.index(axis) for axis in inputs))
        return nnx.Param(values, logical_axes=names), nnx.Param(
            scale, logical_axes=tuple(name for name in names if name not in inputs)
        )


def weight(variable: nnx.Param, beside: Float[Array, "..."] | None = None) -> Array:
    """A parameter where a layer uses it: whole but for its axes over `tensor`.

    Args:
        variable: the parameter, or one layer of a stacked one; it may be split over `fsdp`.
        beside: what it is multiplied with. What is done to the parameter then is done when that is there: else the
            compiler would gather, or convert, those of all layers in front of a loop.
    """
    value, axes = variable[...], variable.get_metadata()["logical_axes"]
    split = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1
    of_list = value.ndim == len(axes)
    if beside is not None and (split or (value.dtype == jnp.int8 and of_list)):
        value, _ = jax.lax.optimization_barrier((value, beside))
    return constrain(value, *axes[-value.ndim :], rules=DECODING)


def multiply(
    spec: str, x: Float[Array, "B T ..."], matrix: nnx.Param, scale: nnx.Param | None, *, merged: int = 1
) -> Float[Array, "B T ..."]:
    """A matrix product; integers are converted as they are read, and the result is scaled.

    Args:
        spec: for einsum, the axes of `scale` last in the result.
        x: activations.
        matrix: from `Storage.matrix`, or one layer of it.
        scale: of the matrix's output channels; None: it is not quantized.
        merged: how many of the matrix's first axes are one in `spec`: as several, the compiler may want them in another
            order, and copy the matrix for it.
    """
    value = weight(matrix, x)
    if merged > 1:
        value = value.reshape(-1, *value.shape[merged:])
    if scale is None:
        return jnp.einsum(spec, x, value)
    # Sums of float16 numbers times integers could overflow.
    dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    product = jnp.einsum(spec, x, value.astype(x.dtype), preferred_element_type=dtype)
    scale_C = weight(scale, x)
    return (wide(product) * scale_C.reshape((1,) * (product.ndim - scale_C.ndim) + scale_C.shape)).astype(x.dtype)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array in float32, or in float64 if it already is: the precision of norms, rotations and softmax."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to the compute dtype, then times a learned weight."""

    def __init__(self, dim: int, *, eps: float, storage: Storage) -> None:
        self.scale = storage.parameter({"norm": dim}, nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T *N D"]) -> Float[Array, "B T *N D"]:
        """Normalises the last axis."""
        x_wide = wide(x)
        normed = x_wide * jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


def rotate(
    x: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], *, theta: float, rotary_dim: int = 0
) -> Float[Array, "B T N H"]:
    """Rotary position embedding of the rotate-half form, computed in float32.

    Args:
        x: queries or keys.
        positions_BT: position of every token in its own row (0 = first real token; padding may hold anything).
        theta: base of the frequencies.
        rotary_dim: how many of a head's first dimensions are rotated, by the frequencies of a head of that width; the
            others pass as they are. 0: all.
    """
    if rotary_dim and rotary_dim < x.shape[-1]:
        turned = rotate(x[..., :rotary_dim], positions_BT, theta=theta)
        return jnp.concatenate([turned, x[..., rotary_dim:]], axis=-1)
    half = x.shape[-1] // 2
    x_wide = wide(x)
    frequency_h = theta ** (-jnp.arange(half, dtype=x_wide.dtype) / half)
    angle = positions_BT.astype(x_wide.dtype)[:, :, None, None] * frequency_h[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x_wide[..., :half], x_wide[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    q, k and v of one key/value head lie side by side in `qkv`, so that a split over K shards all three without moving
    anything between devices: [D, K, G + 2, H], if the layers are stacked [L, K, G + 2, H, D]. Stacked matrices have the
    orders that a TPU's compiler would give them itself, with a copy at every call.
    """

    def __init__(
        self,
        dim: int,
        *,
        kv_heads: int,
        groups: int,
        head_dim: int,
        theta: float,
        bias: bool,
        storage: Storage,
        norm_eps: float | None = None,
        rotary_dim: int = 0,
    ) -> None:
        self.groups = groups
        self.theta = theta
        self.rotary_dim = rotary_dim
        width, heads = {"embed": dim}, {"kv_heads": kv_heads, "qkv": groups + 2, "head_dim": head_dim}
        self.spec, sizes = "btd,dkgh->btkgh", width | heads
        if storage.layers:
            self.spec, sizes = "btd,kghd->btkgh", heads | width
        self.qkv, self.qkv_scale = storage.matrix(sizes, inputs=["embed"])
        self.qkv_bias = storage.parameter(heads, nnx.initializers.zeros) if bias else None
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, eps=norm_eps, storage=storage)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, eps=norm_eps, storage=storage)
        self.out, self.out_scale = storage.matrix(heads | {"qkv": groups} | width, inputs=list(heads))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        seen: Visible,
        *,
        cache: LayerCache | None,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""] | Int[Array, "B"] | None,
        kept_BT: Bool[Array, "B T"] | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache, Looks | None]:
        """Attends to the tokens themselves, or to a cache in which their keys and values were written at `start`."""
        qkv = multiply(self.spec, x, self.qkv, self.qkv_scale)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...][None, None]
        qkv = constrain(qkv, "batch", None, "kv_heads", None, None)
        q, k, v = qkv[..., : self.groups, :], qkv[..., self.groups, :], qkv[..., self.groups + 1, :]
        batch, queries, kv_heads, groups, head_dim = q.shape
        q = q.reshape(batch, queries, kv_heads * groups, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, positions_BT, theta=self.theta, rotary_dim=self.rotary_dim) for x in (q, k))
        own = LayerCache(k=k, v=v)
        keys = own if cache is None else write(cache, own, start, kept_BT=kept_BT, layer=layer)
        here = own if cache is None else keys.of(layer)
        heads = attend(q, here.k, here.v, seen=seen).reshape(batch, queries, -1)
        looks = None if watch is None else look(q, here.k, seen=seen, watch=watch)
        return multiply("btn,nd->btd", heads, self.out, self.out_scale, merged=3), keys, looks


class SwiGLU(nnx.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up stored together as [D, 2, F] (stacked: [L, 2, D, F])."""

    def __init__(self, dim: int, *, hidden_dim: int, storage: Storage) -> None:
        width, hidden = {"embed": dim}, {"mlp": hidden_dim}
        self.spec, sizes = "btd,dcf->btcf", width | {"gate_up": 2} | hidden
        if storage.layers:
            self.spec, sizes = "btd,cdf->btcf", {"gate_up": 2} | width | hidden
        self.gate_up, self.gate_up_scale = storage.matrix(sizes, inputs=["embed"])
        self.down, self.down_scale = storage.matrix(hidden | width, inputs=["mlp"])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the gated MLP to every position."""
        gate_up = constrain(multiply(self.spec, x, self.gate_up, self.gate_up_scale), "batch", None, None, "mlp")
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return multiply("btf,fd->btd", hidden, self.down, self.down_scale)
