"""Keys and values of one layer, and the one way they are written."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class LayerCache:
    """Keys (after rotation) and values of one layer, one array each so that a loop updates them in place."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


Cache = list[LayerCache]


def write(
    cache: LayerCache,
    new: LayerCache,
    start: Int[Array, ""] | Int[Array, "B"] | None,
    *,
    kept_BT: Bool[Array, "B T"] | None = None,
) -> LayerCache:
    """Replaces the columns [start, start + T) of a cache by T new ones.

    Args:
        cache: S columns.
        new: T <= S columns.
        start: first column: one for all rows (a plain update in place) or one per row. The caller keeps
            start + T <= S; beyond that the write would move left silently.
        kept_BT: True for columns that stay as they are; None: all are replaced. Needs one start for all rows.
    """
    if start is None:
        raise ValueError("a cached forward needs the column at which its keys and values are written")

    def put(old: jax.Array, fresh: jax.Array) -> jax.Array:
        if kept_BT is not None:
            current = jax.lax.dynamic_slice_in_dim(old, start, fresh.shape[1], axis=1)
            fresh = jnp.where(kept_BT[:, :, None, None], current, fresh)
        if jnp.ndim(start) == 0:
            return jax.lax.dynamic_update_slice(old, fresh, (0, start, 0, 0))
        return jax.vmap(lambda o, f, s: jax.lax.dynamic_update_slice(o, f, (s, 0, 0)))(old, fresh, start)

    return LayerCache(k=put(cache.k, new.k), v=put(cache.v, new.v))


def widened(cache: Cache, *, columns: int) -> Cache:
    """The cache with empty columns on the right, up to `columns` in all."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, columns - x.shape[1]), (0, 0), (0, 0))), cache)
