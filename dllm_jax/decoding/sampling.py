"""Random draws, the set they are made from, and rankings.

A draw depends on the seed, the row's index in the job, the row's own forward count (without forwards that only close a
block: a cache that is exact draws as none does), the generated position and (for tokens) the vocabulary id; never on
the batch, the slot or the padding.
"""

import functools
import operator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

NEGLIGIBLE = 128.0  # a token whose logit is this far below the largest has probability 0 in float32
BISECTIONS = 32  # of an interval that wide: down to neighbouring numbers


@runtime_checkable
class Noise(Protocol):
    """A source of draws for the prediction slots of a step."""

    def gumbel(
        self, row_B: Int[Array, "B"], nfe_B: Int[Array, "B"], position_BQ: Int[Array, "B Q"], *, vocab_size: int
    ) -> Float[Array, "B Q V"]:
        """Standard Gumbel noise for every slot and token."""

    def uniform(
        self, row_B: Int[Array, "B"], nfe_B: Int[Array, "B"], position_BQ: Int[Array, "B Q"]
    ) -> Float[Array, "B Q"]:
        """Uniform numbers in [0, 1) for every slot."""


@struct.dataclass
class KeyedNoise:
    """Draws from a key by counters."""

    key: jax.Array

    def _keys(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array, *, stream: int) -> jax.Array:
        """One key per slot."""

        def one(row: jax.Array, nfe: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(self.key, stream)
            for counter in (row, nfe, position):
                key = jax.random.fold_in(key, counter)
            return key

        return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)))(row_B, nfe_B, position_BQ)

    def gumbel(
        self, row_B: Int[Array, "B"], nfe_B: Int[Array, "B"], position_BQ: Int[Array, "B Q"], *, vocab_size: int
    ) -> Float[Array, "B Q V"]:
        """Standard Gumbel noise in float32."""
        keys_BQ = self._keys(row_B, nfe_B, position_BQ, stream=0)
        return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32)))(keys_BQ)

    def uniform(
        self, row_B: Int[Array, "B"], nfe_B: Int[Array, "B"], position_BQ: Int[Array, "B Q"]
    ) -> Float[Array, "B Q"]:
        """Uniform numbers in float32."""
        keys_BQ = self._keys(row_B, nfe_B, position_BQ, stream=1)
        return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32)))(keys_BQ)


def nucleus(logits_BQV: Float[Array, "B Q V"], top_p: Float[Array, ""]) -> Bool[Array, "B Q V"]:
    """The likeliest tokens that together hold more than `top_p` of the probability, and no more of them than needed.

    Top-p sampling (arXiv 1904.09751): a token stays if all likelier ones together hold at most `top_p`; equals stay or
    go together. The least logit that stays is found by bisection, by sums instead of a sort: nothing is gathered
    where the vocabulary is sharded.

    Args:
        logits_BQV: logits, divided by the temperature.
        top_p: in (0, 1).
    """
    probability_BQV = jax.nn.softmax(logits_BQV, axis=-1)
    top_BQ = jnp.max(logits_BQV, axis=-1)

    def halve(_: Int[Array, ""], bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        too_low_BQ, high_BQ = bounds
        middle_BQ = (too_low_BQ + high_BQ) / 2
        above_BQ = jnp.sum(jnp.where(logits_BQV > middle_BQ[..., None], probability_BQV, 0), axis=-1)
        fits_BQ = above_BQ <= top_p
        return jnp.where(fits_BQ, too_low_BQ, middle_BQ), jnp.where(fits_BQ, middle_BQ, high_BQ)

    bounds = (top_BQ - NEGLIGIBLE, top_BQ)
    too_low_BQ, _ = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return logits_BQV > too_low_BQ[..., None]


def is_any(token_BQ: Int[Array, "B Q"], ids: tuple[int, ...]) -> Bool[Array, "B Q"]:
    """True for the tokens that are one of the ids."""
    return functools.reduce(operator.or_, (token_BQ == token for token in ids), jnp.zeros(token_BQ.shape, bool))


def top_n(score_BQ: Float[Array, "B Q"], open_BQ: Bool[Array, "B Q"], n_B: Int[Array, "B"]) -> Bool[Array, "B Q"]:
    """The n open slots of the highest score in every row, or all; of equals the lowest position first."""
    return open_BQ & (rank(score_BQ, open_BQ) < n_B[:, None])


def rank(score_BQ: Float[Array, "*B Q"], open_BQ: Bool[Array, "*B Q"]) -> Int[Array, "*B Q"]:
    """Place of every slot among the open ones, 0 for the highest score; of equals the lowest position first.

    Slots that are not open come after all that are.
    """
    return jnp.argsort(order(score_BQ, open_BQ), axis=-1, stable=True)


def order(score_BQ: Float[Array, "*B Q"], open_BQ: Bool[Array, "*B Q"]) -> Int[Array, "*B Q"]:
    """The slot of every place of `rank`."""
    return jnp.argsort(jnp.where(open_BQ, -score_BQ, jnp.inf), axis=-1, stable=True)
