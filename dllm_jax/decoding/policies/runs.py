"""Runs: slots side by side that have something in common. A run is known by its number, counted from the left."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def run_numbers(member_BQ: Bool[Array, "B Q"], key_BQ: Int[Array, "B Q"] | None = None) -> Int[Array, "B Q"]:
    """The number, from 0, of the maximal run of adjacent members that a slot lies in; -1 where it is no member.

    Args:
        member_BQ: the slots that may form runs.
        key_BQ: what the members of a run have in common besides; None: nothing.
    """
    follows_BQ = member_BQ[:, 1:] & member_BQ[:, :-1]
    if key_BQ is not None:
        follows_BQ &= key_BQ[:, 1:] == key_BQ[:, :-1]
    begins_BQ = member_BQ & ~jnp.pad(follows_BQ, ((0, 0), (1, 0)))
    return jnp.where(member_BQ, jnp.cumsum(begins_BQ, axis=1) - 1, -1)


def run_heads(number_BQ: Int[Array, "B Q"], score_BQ: Float[Array, "B Q"]) -> Bool[Array, "B Q"]:
    """The slot of the highest score in every run, the first one of equals."""
    slot_Q = jnp.arange(number_BQ.shape[1])
    same_BQQ = (number_BQ[:, :, None] == number_BQ[:, None, :]) & (number_BQ >= 0)[:, None, :]
    other_BQQ, own_BQQ = score_BQ[:, None, :], score_BQ[:, :, None]
    is_first_BQQ = slot_Q[None, None, :] < slot_Q[None, :, None]
    beaten_BQ = (same_BQQ & ((other_BQQ > own_BQQ) | ((other_BQQ == own_BQQ) & is_first_BQQ))).any(axis=2)
    return (number_BQ >= 0) & ~beaten_BQ


def run_lengths(number_BQ: Int[Array, "B Q"]) -> Int[Array, "B Q"]:
    """How long the run of every slot is; 0 where there is none."""
    same_BQQ = number_BQ[:, :, None] == number_BQ[:, None, :]
    return jnp.where(number_BQ >= 0, same_BQQ.sum(axis=2), 0)
