"""Mixtures of experts: the router, and the products of every token with the few experts that it goes to.

The tokens are sorted by expert and run through one of two grouped matrix products (`grouped`), neither of which moves
the weights of an expert that no token goes to:

- `ragged`: `jax.lax.ragged_dot`, which on TPUs is one kernel for each of an expert's three matrices; also where
  gradients are wanted. Elsewhere it multiplies all tokens with all experts.
- `looped`: a loop over tiles of tokens of one expert each, as many as there are; its weights are read in place. A step
  of the loop costs some microseconds on CPUs, its weights most of the time.

Experts are split over the axis `tensor`, whole ones to a device: that needs no all-to-all, since the tokens are on all
devices of that axis, and one sum over it in the model's dtype, as the MLP of a dense layer does; the compiler makes one
of it and of that of the shared MLP. Their width is not split: of 512 eight devices would have 64, half of a TPU's lanes
(LLaDA2-mini's 19 layers on v5e:2x4: 2.55 GB for a copy of the gates in the kernel's order; whole experts need none).
All tokens' routes are computed on every device of the axis.

Shape letters as in `layers.py`, with N tokens, E experts, C experts of a token, F width of an expert, M = N C rows of
tokens and experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dllm_jax.mesh import ACTIVATIONS, DECODING, constrain, spec
from dllm_jax.models.layers import Storage, SwiGLU, wide

WHOLE = "expert_"  # parameters of this name go to stacked layers as they are, of all layers: no layer is cut out
LEAST_TILE, MOST_TILE = 8, 128  # rows of a step of `looped`
NONE = 1e-20  # keeps a sum of weights from being 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """The mixture of experts of a model's layers.

    A token's score for an expert is the sigmoid, or the softmax over all experts, of a linear map of it. The best go by
    the score, with a bias for every expert if there is one; if experts are in groups, by those of the best groups, of
    which each counts by the sum of its two best.
    """

    count: int  # E
    per_token: int  # C
    hidden_dim: int  # F
    dense_layers: tuple[int, ...] = ()  # layers that have an MLP instead
    shared_dim: int = 0  # width of an MLP that every token goes through besides; 0: none
    sigmoid: bool = False  # else softmax
    wide_gate: bool = False  # the linear map in float32, else in the model's dtype
    biased: bool = False  # there is a bias
    bias_counts: bool = False  # the bias is part of the weights too
    bias_dtype: str = "float32"  # of the bias, "" is the model's; what is stored decides
    groups: int = 1
    groups_per_token: int = 1
    normalized: bool = False  # the weights of a token sum to 1
    scale: float = 1.0  # of the weights
    stacked_files: bool = False  # a tensor of a checkpoint holds all experts of a layer


class Routes(NamedTuple):
    """Where tokens go."""

    experts_NC: Int[Array, "N C"]  # best first; of equal ones the one of the lower number
    weights_NC: Float[Array, "N C"]


def route(
    x_ND: Float[Array, "N D"],
    router_DE: Float[Array, "D E"],
    bias_E: Float[Array, "E"] | None,
    *,
    settings: ExpertSettings,
) -> Routes:
    """The experts of every token, and their weights in float32.

    Args:
        x_ND: what goes into the experts.
        router_DE: the linear map.
        bias_E: of every expert; None without.
        settings: of the model.
    """
    if settings.wide_gate:
        logits_NE = jnp.einsum("nd,de->ne", wide(x_ND), wide(router_DE), precision="highest")
    else:
        logits_NE = wide(jnp.einsum("nd,de->ne", x_ND, router_DE))
    score_NE = jax.nn.sigmoid(logits_NE) if settings.sigmoid else jax.nn.softmax(logits_NE, axis=-1)
    ranked_NE = score_NE if bias_E is None else score_NE + wide(bias_E)[None]
    weighed_NE = ranked_NE if settings.bias_counts else score_NE
    if settings.groups > 1:
        ranked_NE = _best_groups(ranked_NE, settings)
    experts_NC = jax.lax.top_k(ranked_NE, settings.per_token)[1]
    weights_NC = jnp.take_along_axis(weighed_NE, experts_NC, axis=1)
    if settings.normalized and settings.per_token > 1:
        weights_NC = weights_NC / (weights_NC.sum(axis=1, keepdims=True) + NONE)
    return Routes(experts_NC, weights_NC * settings.scale)


def _best_groups(ranked_NE: Float[Array, "N E"], settings: ExpertSettings) -> Float[Array, "N E"]:
    """The ranks with -inf for the experts of groups that are not among the best."""
    by_group = ranked_NE.reshape(len(ranked_NE), settings.groups, -1)
    sums_NG = jax.lax.top_k(by_group, min(2, by_group.shape[2]))[0].sum(axis=2)
    best_NK = jax.lax.top_k(sums_NG, settings.groups_per_token)[1]
    kept_NG = (best_NK[:, :, None] == jnp.arange(settings.groups)[None, None]).any(axis=1)
    return jnp.where(kept_NG[:, :, None], by_group, -jnp.inf).reshape(ranked_NE.shape)


class Matrix(NamedTuple):
    """A matrix of every expert, of one layer or of all: [..., E, D, F] or [..., E, F, D]."""

    values: Any
    scale: Any = None  # [..., E, F] or [..., E, D], if the values are integers

    def flat(self) -> "Matrix":
        """The experts of all layers along one axis."""
        values = self.values.reshape(-1, *self.values.shape[-2:])
        return Matrix(values, None if self.scale is None else self.scale.reshape(-1, self.scale.shape[-1]))


class Matrices(NamedTuple):
    """Those of every expert's SwiGLU."""

    gate: Matrix
    up: Matrix
    down: Matrix


class Group(NamedTuple):
    """Rows sorted by expert, and how many belong to each."""

    x_MD: Float[Array, "M D"]
    expert_M: Int[Array, "M"]  # counted from the first of `sizes_E`; of rows behind the last group it means nothing
    sizes_E: Int[Array, "E"]


Kernel = Callable[[Group, Matrices, Int[Array, ""] | int], Float[Array, "M D"]]


def _ragged(group: Group, matrices: Matrices, first: Int[Array, ""] | int) -> Array:
    """All rows at once; the experts of other layers are groups without rows."""
    dtype = group.x_MD.dtype
    sizes = jnp.zeros(len(matrices.gate.values), jnp.int32)
    sizes = jax.lax.dynamic_update_slice(sizes, group.sizes_E.astype(jnp.int32), (first,))

    def product(x: Array, matrix: Matrix, *, out: jnp.dtype) -> Array:
        if matrix.scale is None:
            return jax.lax.ragged_dot(x, matrix.values, sizes, preferred_element_type=out)
        exact = jnp.promote_types(jnp.float32, dtype)
        whole = jax.lax.ragged_dot(x, matrix.values, sizes, preferred_element_type=exact)
        return (whole * matrix.scale[first + group.expert_M]).astype(out)

    gate, up, down = matrices
    hidden = jax.nn.silu(product(group.x_MD, gate, out=dtype)) * product(group.x_MD, up, out=dtype)
    return product(hidden, down, out=jnp.promote_types(dtype, jnp.float32))


def _looped(group: Group, matrices: Matrices, first: Int[Array, ""] | int) -> Array:
    """Some rows of one expert at a time. What a step computes behind its expert's last row the next one overwrites."""
    x, (rows, width), dtype = group.x_MD, group.x_MD.shape, group.x_MD.dtype
    each = -(-rows // len(group.sizes_E))
    tile = min(max(LEAST_TILE, 1 << (each - 1).bit_length()), MOST_TILE)
    x = jnp.pad(x, ((0, tile), (0, 0)))
    tiles_E = -(-group.sizes_E // tile)
    ends_E, starts_E = jnp.cumsum(tiles_E), jnp.cumsum(group.sizes_E) - group.sizes_E
    wide_dtype = jnp.promote_types(dtype, jnp.float32)

    def step(number: Int[Array, ""], out: Array) -> Array:
        expert = jnp.searchsorted(ends_E, number, side="right")
        start = starts_E[expert] + (number - ends_E[expert] + tiles_E[expert]) * tile

        def product(x: Array, matrix: Matrix) -> Array:
            values = jax.lax.dynamic_index_in_dim(matrix.values, first + expert, keepdims=False)
            whole = jnp.einsum("td,df->tf", x, values.astype(dtype), preferred_element_type=wide_dtype)
            if matrix.scale is not None:
                whole = whole * jax.lax.dynamic_index_in_dim(matrix.scale, first + expert, keepdims=True)
            return whole

        gate, up, down = matrices
        some = jax.lax.dynamic_slice_in_dim(x, start, tile)
        hidden = jax.nn.silu(product(some, gate).astype(dtype)) * product(some, up).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, product(hidden, down), start, axis=0)

    out = jax.lax.fori_loop(0, ends_E[-1], step, jnp.zeros((rows + tile, width), wide_dtype))
    return out[:rows]


KERNELS: dict[str, Kernel] = {"ragged": _ragged, "looped": _looped}


def kernel(platform: str, *, differentiable: bool) -> str:
    """The grouped product to use, one of `KERNELS`.

    Args:
        platform: "cpu", "gpu" or "tpu"; anything else stands for one that is not known.
        differentiable: whether a gradient may be asked for; the loop has none.
    """
    return "ragged" if platform == "tpu" or differentiable else "looped"


def grouped(
    x_ND: Float[Array, "N D"],
    routes: Routes,
    matrices: Matrices,
    *,
    layer: Int[Array, ""] | int,
    name: str,
    part: Int[Array, ""] | int = 0,
    parts: int = 1,
) -> Float[Array, "N D"]:
    """The weighted sums of what a part of the experts make of the tokens, in float32.

    Args:
        x_ND: tokens.
        routes: of all experts.
        matrices: gate, up and down of the part's experts, of one layer or of all.
        layer: of those.
        name: of the kernel.
        part: which one.
        parts: of equal size, of all experts.
    """
    own = matrices.gate.values.shape[-3]  # experts
    flat = Matrices(*(matrix.flat() for matrix in matrices))
    experts_M = routes.experts_NC.reshape(-1)
    order_M = jnp.argsort(experts_M, stable=True)
    sizes = jnp.zeros(own * parts, jnp.int32).at[experts_M].add(1)
    before = jnp.where(jnp.arange(own * parts) < part * own, sizes, 0).sum()
    sizes_E = jax.lax.dynamic_slice_in_dim(sizes, part * own, own)
    order_M = jnp.roll(order_M, -before)  # the part's own rows first
    group = Group(x_ND[order_M // routes.experts_NC.shape[1]], experts_M[order_M] - part * own, sizes_E)
    out_MD = KERNELS[name](group, flat, layer * own)
    out_MD = jnp.where(jnp.arange(len(out_MD))[:, None] < sizes_E.sum(), out_MD, 0)
    place_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(len(order_M)))
    return jnp.einsum("ncd,nc->nd", out_MD[place_M].reshape(*routes.experts_NC.shape, -1), routes.weights_NC)


class Experts(nnx.Module):
    """What stands in for a layer's MLP: some experts of many for every token, and perhaps an MLP for all.

    Every expert is a SwiGLU; `expert_gate` and `expert_up` are [E, D, F], `expert_down` [E, F, D], stacked [L, E, ...].
    """

    def __init__(self, dim: int, *, settings: ExpertSettings, differentiable: bool, storage: Storage) -> None:
        self.settings = settings
        self.differentiable = differentiable
        width, experts = {"embed": dim}, {"experts": settings.count}
        hidden = {"expert_mlp": settings.hidden_dim}
        self.router = storage.parameter(width | {"router": settings.count}, nnx.initializers.normal(0.02))
        self.router_bias: nnx.Param | None = None
        if settings.biased:
            kept = dataclasses.replace(storage, dtype=jnp.dtype(settings.bias_dtype or storage.dtype))
            self.router_bias = nnx.data(kept.parameter({"router": settings.count}, nnx.initializers.zeros))
        self.expert_gate, self.expert_gate_scale = storage.matrix(experts | width | hidden, inputs=["embed"])
        self.expert_up, self.expert_up_scale = storage.matrix(experts | width | hidden, inputs=["embed"])
        self.expert_down, self.expert_down_scale = storage.matrix(experts | hidden | width, inputs=["expert_mlp"])
        self.shared: SwiGLU | None = None
        if settings.shared_dim:
            self.shared = nnx.data(SwiGLU(dim, hidden_dim=settings.shared_dim, storage=storage))

    def __call__(self, x: Float[Array, "B T D"], *, layer: Int[Array, ""] | None) -> Float[Array, "B T D"]:
        """Sends every position to its experts.

        Args:
            x: activations.
            layer: among the stacked ones, whose experts' matrices are those of all layers; None: of a list.
        """
        batch, columns, width = x.shape
        bias_E = None if self.router_bias is None else self.router_bias[...]
        routes = route(x.reshape(-1, width), self.router[...], bias_E, settings=self.settings)
        matrices = Matrices(
            self._matrix(self.expert_gate, self.expert_gate_scale, layer, x),
            self._matrix(self.expert_up, self.expert_up_scale, layer, x),
            self._matrix(self.expert_down, self.expert_down_scale, layer, x),
        )
        whole = layer is not None and matrices.gate.values.ndim == 4
        by_row = Routes(routes.experts_NC.reshape(batch, columns, -1), routes.weights_NC.reshape(batch, columns, -1))
        routed = _on_mesh(x, by_row, matrices, layer if whole else None, differentiable=self.differentiable)
        mixed = constrain(routed.astype(x.dtype), "batch", None, None)
        return mixed if self.shared is None else mixed + self.shared(x)

    def _matrix(
        self, values: nnx.Param, scale: nnx.Param | None, layer: Int[Array, ""] | None, beside: Array
    ) -> Matrix:
        return Matrix(_placed(values, layer, beside), None if scale is None else _placed(scale, layer, beside))


def _placed(variable: nnx.Param, layer: Int[Array, ""] | None, beside: Array) -> Array:
    """The experts' matrices of all layers where they are; of one layer, gathered, if they are split over `fsdp`."""
    value, axes = variable[...], variable.get_metadata()["logical_axes"]
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1:
        value, _ = jax.lax.optimization_barrier((value, beside))
        if layer is not None:
            value, axes = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False), axes[1:]
    return constrain(value, *axes[-value.ndim :], rules=DECODING)


def _on_mesh(
    x: Float[Array, "B T D"],
    routes: Routes,
    matrices: Matrices,
    layer: Int[Array, ""] | None,
    *,
    differentiable: bool,
) -> Float[Array, "B T D"]:
    """`grouped` with every device's own experts, if there are several devices, and the sum of what they make."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = kernel(device.platform if device else jax.default_backend(), differentiable=differentiable)
    layer = jnp.int32(0) if layer is None else layer
    if mesh.empty or mesh.size == 1:
        return _rows(x, routes, matrices, layer, name=name, parts=1)
    tensor = mesh.shape["tensor"]
    parts = tensor if matrices.gate.values.shape[-3] % tensor == 0 else 1
    rows = spec(("batch", None, None), x.shape, mesh.shape, rules=ACTIVATIONS)
    before = [None] * (matrices.gate.values.ndim - 3)  # of all layers
    split = PartitionSpec(*before, "tensor") if parts > 1 else PartitionSpec()
    places = jax.tree.map(lambda _: split, matrices)
    run = functools.partial(_rows, name=name, parts=parts)
    specs = (rows, jax.tree.map(lambda _: rows, routes), places, PartitionSpec())
    return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)(x, routes, matrices, layer)


def _rows(
    x: Float[Array, "B T D"],
    routes: Routes,
    matrices: Matrices,
    layer: Int[Array, ""],
    *,
    name: str,
    parts: int,
) -> Float[Array, "B T D"]:
    """`grouped` of rows on one device."""
    chosen = routes.experts_NC.shape[-1]
    flat = Routes(routes.experts_NC.reshape(-1, chosen), routes.weights_NC.reshape(-1, chosen))
    part = jax.lax.axis_index("tensor") if parts > 1 else 0
    out = grouped(x.reshape(-1, x.shape[-1]), flat, matrices, layer=layer, name=name, part=part, parts=parts)
    out = jax.lax.psum(out.astype(x.dtype), "tensor") if parts > 1 else out
    return out.reshape(x.shape)
