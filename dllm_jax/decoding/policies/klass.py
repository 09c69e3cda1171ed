"""KLASS (arXiv 2511.05664, github.com/shkim0116/KLASS): commits what the model is sure of and has stopped to change.

Released for LLaDA: confidence 0.6, divergence 0.015, history 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, PerSlot, Policy, Sizes, View, Wants, best, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.mesh import constrain

FLOOR = 1e-12  # keeps the logarithm of a probability 0 finite


class Memory(NamedTuple):
    """What is remembered of every slot, from its first forward in the block on."""

    probability_BQV: Float[Array, "B Q V"]  # of the last forward
    steady_BQ: Int[Array, "B Q"]  # forwards in a row with a small divergence, up to the last


@struct.dataclass
class Klass(Policy):
    """Ready are open positions surer than `confidence` whose distribution diverged by less than `divergence` lately.

    That is, the Kullback-Leibler divergence of a forward's distribution from the last one's, in each of the last
    `history` forwards on the block.
    """

    confidence: Float[Array, ""]
    divergence: Float[Array, ""]
    history: Int[Array, ""]

    @property
    def wants(self) -> Wants:
        """Whole distributions are compared."""
        return Wants(logits=True)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> PerSlot:
        """Probability 0 for all: the first divergence of a block is large."""
        shape = (len(state.nfe_B), sizes.slots)
        zero_BQV = jnp.zeros((*shape, sizes.vocab), jnp.float32)
        return PerSlot(Memory(constrain(zero_BQV, "batch", None, "vocab"), jnp.zeros(shape, jnp.int32)))

    def commit(self, policy_state: PerSlot, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """All that is ready, else the best."""
        old, probability_BQV = policy_state.value, jax.nn.softmax(prediction.logits_BQV, axis=-1)
        divergence_BQ = divergence(probability_BQV, old.probability_BQV)
        steady_BQ = jnp.where(divergence_BQ < self.divergence, old.steady_BQ + 1, 0)
        sure_BQ = view.open_BQ & (prediction.confidence_BQ > self.confidence)
        ready_BQ = sure_BQ & (steady_BQ >= self.history) & (view.block_nfe_B + 1 >= self.history)[:, None]
        mask_BQ = jnp.where(ready_BQ.any(axis=1, keepdims=True), ready_BQ, best(prediction.confidence_BQ, view.open_BQ))
        new = Memory(
            jnp.where(view.block_BQ[..., None], probability_BQV, old.probability_BQV),
            jnp.where(view.block_BQ, steady_BQ, old.steady_BQ),
        )
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), PerSlot(new))


def divergence(new_BQV: Float[Array, "B Q V"], old_BQV: Float[Array, "B Q V"]) -> Float[Array, "B Q"]:
    """The sum of p (ln p - ln p') over the vocabulary."""
    return jnp.sum(new_BQV * (jnp.log(new_BQV + FLOOR) - jnp.log(old_BQV + FLOOR)), axis=-1)
