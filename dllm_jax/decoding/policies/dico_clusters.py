"""The geometry of DiCo's clusters: stretches of a block, held as the runs of True in a bool vector over its positions.

Clusters at rest are disjoint and never adjacent (those that meet are merged), so the vector says all: a union is `or`,
and merges happen by themselves. Where a cluster begins or ends is computed for every position of the block at once.
Shape letter: Q positions of a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def previous(flag_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """For every position the last True at or before it; -1 without one."""
    index_Q = jnp.arange(len(flag_Q))
    return jax.lax.cummax(jnp.where(flag_Q, index_Q, -1))


def following(flag_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """For every position the first True at or after it; Q without one."""
    index_Q = jnp.arange(len(flag_Q))
    return jax.lax.cummin(jnp.where(flag_Q, index_Q, len(flag_Q)), reverse=True)


def before(flag_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """For every position the last True before it; -1 without one."""
    return jnp.concatenate([jnp.array([-1]), previous(flag_Q)[:-1]])


def behind(flag_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """For every position the first True behind it; Q without one."""
    return jnp.concatenate([following(flag_Q)[1:], jnp.array([len(flag_Q)])])


def heads(cluster_Q: Bool[Array, "Q"]) -> Bool[Array, "Q"]:
    """The first position of every cluster."""
    return jnp.diff(cluster_Q.astype(jnp.int32), prepend=0) == 1


def number(cluster_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """Which cluster a position belongs to, from 1; 0 for none."""
    return jnp.where(cluster_Q, jnp.cumsum(heads(cluster_Q)), 0)


def bounds(cluster_Q: Bool[Array, "Q"]) -> tuple[Int[Array, "Q"], Int[Array, "Q"]]:
    """First and last position of the cluster at every position; outside of clusters the position itself."""
    index_Q = jnp.arange(len(cluster_Q))
    tails_Q = jnp.diff(cluster_Q.astype(jnp.int32), append=0) == -1
    left_Q = jnp.where(cluster_Q, previous(heads(cluster_Q)), index_Q)
    return left_Q, jnp.where(cluster_Q, following(tails_Q), index_Q)


def grown(
    left_Q: Int[Array, "Q"],
    right_Q: Int[Array, "Q"],
    hit_Q: Bool[Array, "Q"],
    *,
    tolerance: Int[Array, ""],
    first_Q: Int[Array, "Q"] | int,
    last_Q: Int[Array, "Q"] | int,
) -> tuple[Int[Array, "Q"], Int[Array, "Q"]]:
    """Stretches [left, right] grown in both directions: from hit to hit, over at most `tolerance` misses in a row.

    Args:
        left_Q: where stretches begin (one for every position of the block, whatever it stands for).
        right_Q: where they end.
        hit_Q: the positions to grow onto.
        tolerance: misses in a row that growth gets across.
        first_Q: the last position that growth to the left looks at.
        last_Q: the last position that growth to the right looks at.

    Returns:
        Where they begin and end then: at a hit, or as before.
    """
    end = len(hit_Q) - 1
    mirrored_Q = _grown_left(end - right_Q, hit_Q[::-1], tolerance, end - last_Q)
    return _grown_left(left_Q, hit_Q, tolerance, first_Q), end - mirrored_Q


def _grown_left(
    start_Q: Int[Array, "Q"], hit_Q: Bool[Array, "Q"], tolerance: Int[Array, ""], limit_Q: Int[Array, "Q"] | int
) -> Int[Array, "Q"]:
    before_Q = before(hit_Q)
    is_far_Q = jnp.arange(len(hit_Q)) - before_Q > tolerance + 1
    chain_Q = previous(hit_Q & (is_far_Q | (before_Q < 0)))  # the hit where a chain of hits within reach begins
    nearest_Q = before_Q[start_Q]
    grows_Q = (nearest_Q >= limit_Q) & ~is_far_Q[start_Q]
    return jnp.where(grows_Q, jnp.maximum(chain_Q[nearest_Q], following(hit_Q)[limit_Q]), start_Q)


def shrunk(
    left_Q: Int[Array, "Q"], right_Q: Int[Array, "Q"], open_Q: Bool[Array, "Q"]
) -> tuple[Int[Array, "Q"], Int[Array, "Q"]]:
    """Stretches with their committed ends cut off; the left end is behind the right where nothing is left."""
    return following(open_Q)[left_Q], previous(open_Q)[right_Q]


def union(which_Q: Bool[Array, "Q"], left_Q: Int[Array, "Q"], right_Q: Int[Array, "Q"]) -> Bool[Array, "Q"]:
    """The clusters made of some stretches [left, right]: those that overlap or touch are one."""
    index_1Q = jnp.arange(len(which_Q))[None, :]
    return (which_Q[:, None] & (left_Q[:, None] <= index_1Q) & (index_1Q <= right_Q[:, None])).any(axis=0)


def widths(cluster_Q: Bool[Array, "Q"]) -> Int[Array, "Q"]:
    """Positions of the first cluster, of the second, ...; then zeros."""
    place_1Q = jnp.arange(len(cluster_Q))[None, :] + 1
    return jnp.sum(number(cluster_Q)[:, None] == place_1Q, axis=0)
