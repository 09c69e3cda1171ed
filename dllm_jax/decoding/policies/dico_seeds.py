"""Where DiCo's Divide phase begins: the trajectory weights and the choice of seeds (arXiv 2602.23792).

Tokens near the left edge of a block's masks are surer to be right than their confidence says, the more so the less is
generated. So confidences are weighted by position before the best are chosen as seeds. Everything here is about one
row; shape letters: Q positions of a block, N seeds.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


class Block(NamedTuple):
    """A row's block in a step, before the commit."""

    open_Q: Bool[Array, "Q"]  # masked
    confidence_Q: Float[Array, "Q"]  # -inf where not open
    margin_Q: Float[Array, "Q"]
    written_Q: Bool[Array, "Q"]  # a commit would write a token here (the proposal is not the mask itself)
    filled: Int[Array, ""]  # tokens in the row's whole generation
    nfe: Int[Array, ""]  # the row's forwards before this one
    is_new: Bool[Array, ""]  # none of them in this block
    start: Int[Array, ""]  # generated position of the block's first

    def left(self, chosen_Q: Bool[Array, "Q"]) -> Bool[Array, "Q"]:
        """What is still masked after a commit."""
        return self.open_Q & ~(chosen_Q & self.written_Q)


@struct.dataclass
class Trajectory:
    """Numbers of the weights: over the n positions from the first mask on they fall from max_weight to w_min."""

    alpha: Float[Array, ""]
    beta: Float[Array, ""]
    max_weight: Float[Array, ""]
    gen_length: Float[Array, ""]

    def least(self, block: Block) -> Float[Array, ""]:
        """w_min = min(1, beta + alpha r), r the share of the generation that is filled."""
        return jnp.minimum(1, self.beta + self.alpha * (block.filled / self.gen_length))


Weighting = Callable[[Trajectory, Block], Float[Array, "Q"]]


def unweighted(trajectory: Trajectory, block: Block) -> Float[Array, "Q"]:
    """W = 1: no trajectory guidance."""
    return jnp.ones_like(block.confidence_Q)


def exponential(trajectory: Trajectory, block: Block) -> Float[Array, "Q"]:
    """W_j = w_max exp(-lambda j), lambda = -ln(w_min / w_max) / (n - 1)."""
    share_Q = _share_of_way(block)
    return trajectory.max_weight * jnp.exp(jnp.log(trajectory.least(block) / trajectory.max_weight) * share_Q)


def linear(trajectory: Trajectory, block: Block) -> Float[Array, "Q"]:
    """W_j = w_max + (w_min - w_max) j / (n - 1)."""
    return trajectory.max_weight + (trajectory.least(block) - trajectory.max_weight) * _share_of_way(block)


def static(trajectory: Trajectory, block: Block) -> Float[Array, "Q"]:
    """W = exp(a ln(beta) / (B - 1)) in the a-th forward of the row, the same everywhere.

    As in the released code, which means positions but counts forwards; it fails at the B-th, here the weight falls on.
    """
    last = max(block.open_Q.size - 1, 1)
    return jnp.full_like(block.confidence_Q, jnp.exp(jnp.log(trajectory.beta) / last * (block.nfe + 1)))


def _share_of_way(block: Block) -> Float[Array, "Q"]:
    """The share j / (n - 1): 0 at the first mask (and before it), 1 at the block's end."""
    size = block.open_Q.size
    first = jnp.argmax(block.open_Q)
    return jnp.maximum(jnp.arange(size) - first, 0) / jnp.maximum(size - 1 - first, 1)


WEIGHTINGS: dict[str, Weighting] = {
    "none": unweighted,
    "exponential": exponential,
    "linear": linear,
    "static": static,
}


@runtime_checkable
class SeedMethod(Protocol):
    """A choice of seeds; see `soft_nms`."""

    def __call__(
        self,
        score_Q: Float[Array, "Q"],
        *,
        threshold: Float[Array, ""],
        sigma: Float[Array, ""],
        count: Int[Array, ""],
    ) -> Int[Array, "Q"]:
        """The seeds in their order."""


def soft_nms(
    score_Q: Float[Array, "Q"], *, threshold: Float[Array, ""], sigma: Float[Array, ""], count: Int[Array, ""]
) -> Int[Array, "Q"]:
    """The best, again and again, each time weakening its neighbours: y_j *= 1 - exp(-(j - i)^2 / sigma^2).

    Args:
        score_Q: weighted confidence, -inf where not open.
        threshold: the least score of a seed, h; the first choice that is below ends it.
        sigma: how far a seed weakens others.
        count: seeds wanted, N.

    Returns:
        k for the k-th seed, 0 elsewhere.
    """
    index_Q = jnp.arange(len(score_Q))

    def choose(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        left_Q, seed_Q, k, _ = state
        best = jnp.argmax(left_Q)
        is_seed = (left_Q[best] > 0) & (score_Q[best] >= threshold)
        seed_Q = jnp.where(is_seed & (index_Q == best), k, seed_Q)
        kept_Q = 1 - jnp.exp(-((index_Q - best) ** 2) / sigma**2)
        return jnp.where(left_Q > 0, left_Q * kept_Q, left_Q), seed_Q, k + 1, is_seed

    start = (score_Q, jnp.zeros_like(index_Q), jnp.int32(1), jnp.array(True))
    return jax.lax.while_loop(lambda state: state[3] & (state[2] <= count), choose, start)[1]


def regular_interval(
    score_Q: Float[Array, "Q"], *, threshold: Float[Array, ""], sigma: Float[Array, ""], count: Int[Array, ""]
) -> Int[Array, "Q"]:
    """The best of every one of m equal segments, if it is above the threshold; m = min(count, positions above 0).

    Args and returns: see `soft_nms`; `sigma` is not used.
    """
    segments = jnp.minimum(count, jnp.sum(score_Q > 0))
    segment_Q = (jnp.arange(1, len(score_Q) + 1) * segments - 1) // len(score_Q)  # the a-th begins at floor(a B / m)
    is_seed_Q = (place_in_group(score_Q, segment_Q) == 0) & (score_Q > threshold)
    return jnp.where(is_seed_Q, segment_Q + 1, 0)


def place_in_group(score_Q: Float[Array, "Q"], group_Q: Int[Array, "Q"]) -> Int[Array, "Q"]:
    """How many positions of the same group have a higher score, or the same and lie before."""
    index_Q = jnp.arange(len(score_Q))
    is_before_QQ = index_Q[None, :] < index_Q[:, None]
    is_equal_QQ = score_Q[None, :] == score_Q[:, None]
    goes_first_QQ = (score_Q[None, :] > score_Q[:, None]) | (is_equal_QQ & is_before_QQ)
    return jnp.sum(goes_first_QQ & (group_Q[None, :] == group_Q[:, None]), axis=1)


SEED_METHODS: dict[str, SeedMethod] = {"soft_nms": soft_nms, "regular_interval": regular_interval}
