"""The loops of models of block diffusion: as many tokens as are sure, or the scheduled number (SDAR, LLaDA2.0).

A block of b columns has so many steps; a step is due b / steps tokens, the first ones one more for the remainder,
whatever of the block is prompt.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.config import Config
from dllm_jax.decoding.policies.base import Commit, Parts, Policy, View, full
from dllm_jax.decoding.policies.confidence import scheduled, steps_per_block
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, top_n


def sure_or_best(
    confidence_BQ: Float[Array, "B Q"],
    open_BQ: Bool[Array, "B Q"],
    *,
    above: Float[Array, ""],
    least_B: Int[Array, "B"],
) -> Bool[Array, "B Q"]:
    """The open slots surer than a threshold, if they are enough; else the surest ones, as many as are due.

    Args:
        confidence_BQ: of every slot.
        open_BQ: that may be chosen.
        above: the threshold, which is not enough itself.
        least_B: how many are due.
    """
    sure_BQ = open_BQ & (confidence_BQ > above)
    enough_B = sure_BQ.sum(axis=-1) >= least_B
    return jnp.where(enough_B[:, None], sure_BQ, top_n(confidence_BQ, open_BQ, least_B))


@struct.dataclass
class Dynamic(Policy):
    """Commits every open position above a confidence if those are as many as are due, else the surest that are due.

    With a threshold of 1 that is SDAR's static schedule.
    """

    threshold: Float[Array, ""]
    steps_per_block: Int[Array, ""]
    block_length: int = struct.field(pytree_node=False)

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The open slots with c > threshold, or the best n. The block is left after its last step."""
        n_B = _due(view, self.block_length, self.steps_per_block)
        mask_BQ = sure_or_best(prediction.confidence_BQ, view.open_BQ, above=self.threshold, least_B=n_B)
        leave_B = full(view.open_BQ, mask_BQ) | (view.block_nfe_B + 1 >= self.steps_per_block)
        return Commit(mask_BQ, prediction.token_BQ, leave_B, policy_state)


@struct.dataclass
class Sequential(Policy):
    """Commits the open positions from the left, as many as are due."""

    steps_per_block: Int[Array, ""]
    block_length: int = struct.field(pytree_node=False)

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The first n open slots."""
        n_B = _due(view, self.block_length, self.steps_per_block)
        mask_BQ = view.open_BQ & (jnp.cumsum(view.open_BQ, axis=-1) <= n_B[:, None])
        leave_B = full(view.open_BQ, mask_BQ) | (view.block_nfe_B + 1 >= self.steps_per_block)
        return Commit(mask_BQ, prediction.token_BQ, leave_B, policy_state)


def build_dynamic(config: Config, parts: Parts) -> Dynamic:
    """The policy of the settings."""
    steps, block_length = steps_per_block(config.decode), parts.block_length
    return Dynamic(jnp.float32(config.dynamic.threshold), steps, block_length)


def build_sequential(config: Config, parts: Parts) -> Sequential:
    """The policy of the settings."""
    return Sequential(steps_per_block(config.decode), parts.block_length)


def _due(view: View, block_length: int, steps: Int[Array, ""]) -> Int[Array, "B"]:
    """Tokens of the step, of all of the block."""
    return scheduled(jnp.full_like(view.block_nfe_B, block_length), view.block_nfe_B, steps)
