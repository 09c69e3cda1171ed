"""Keys and values, of one layer or of all, and the one way they are written."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class LayerCache:
    """Keys (after rotation) and values, one array each so that a loop updates them in place.

    Of one layer, or of all of them if they are stacked (`TransformerConfig.stacked`).
    """

    k: Float[Array, "*layers B S K H"]
    v: Float[Array, "*layers B S K H"]

    def of(self, layer: Int[Array, ""] | None) -> "LayerCache":
        """Those of one layer of stacked ones; None: the cache itself, which is of one."""
        if layer is None:
            return self
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)


Cache = list[LayerCache] | LayerCache


def write(
    cache: LayerCache,
    new: LayerCache,
    start: Int[Array, ""] | Int[Array, "B"] | None,
    *,
    kept_BT: Bool[Array, "B T"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> LayerCache:
    """Replaces the columns [start, start + T) of a cache by T new ones.

    Args:
        cache: S columns, of one layer or of all.
        new: T <= S columns.
        start: first column: one for all rows (a plain update in place) or one per row. The caller keeps
            start + T <= S; beyond that the write would move left silently.
        kept_BT: True for columns that stay as they are; None: all are replaced.
        layer: whose they are, if the cache is of all.
    """
    if start is None:
        raise ValueError("a cached forward needs the column at which its keys and values are written")

    def put(old: jax.Array, fresh: jax.Array) -> jax.Array:
        if jnp.ndim(start) == 1:
            if kept_BT is not None:
                of_layer = old if layer is None else jax.lax.dynamic_index_in_dim(old, layer, keepdims=False)
                fresh = jnp.where(kept_BT[:, :, None, None], _take_per_row(of_layer, start, like=fresh), fresh)
            return _put_per_row(old, fresh, start, layer=layer)
        first = (0, start, 0, 0) if layer is None else (layer, 0, start, 0, 0)
        fresh = fresh.reshape((1,) * (old.ndim - fresh.ndim) + fresh.shape)
        if kept_BT is not None:
            current = jax.lax.dynamic_slice(old, first, fresh.shape)
            fresh = jnp.where(kept_BT[:, :, None, None], current, fresh)
        return jax.lax.dynamic_update_slice(old, fresh, first)

    return LayerCache(k=put(cache.k, new.k), v=put(cache.v, new.v))


def _take_per_row(
    old: Float[Array, "B S K H"], start_B: Int[Array, "B"], *, like: Float[Array, "B T K H"]
) -> Float[Array, "B T K H"]:
    """Every row's columns from a column of its own on."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, like.shape[1], axis=0))(old, start_B)


def _put_per_row(
    old: Float[Array, "*layers B S K H"],
    fresh: Float[Array, "B T K H"],
    start_B: Int[Array, "B"],
    *,
    layer: Int[Array, ""] | None,
) -> Float[Array, "*layers B S K H"]:
    """Every row's new columns from a column of its own on, in place; `layer` as in `write`."""
    stacked = layer is not None
    indices = start_B[:, None] if layer is None else jnp.stack([jnp.full_like(start_B, layer), start_B], axis=1)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,) if stacked else (),
        scatter_dims_to_operand_dims=(0, 2) if stacked else (1,),
        operand_batching_dims=(int(stacked),),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        old,
        indices,
        fresh,
        dimensions,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )


def widened(cache: Cache, *, columns: int) -> Cache:
    """The cache with empty columns on the right, up to `columns` in all."""
    missing = columns - columns_of(cache)
    return jax.tree.map(lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (0, missing), (0, 0), (0, 0)]), cache)


def columns_of(cache: Cache) -> int:
    """Columns of a cache."""
    return jax.tree.leaves(cache)[0].shape[-3]


def of_rows(new_B: Bool[Array, "B"], new: Cache, old: Cache) -> Cache:
    """A cache with the keys and values of some rows from another one."""
    return jax.tree.map(lambda n, o: jnp.where(new_B[:, None, None, None], n, o), new, old)
