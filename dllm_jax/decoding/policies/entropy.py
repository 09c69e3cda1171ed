"""Commits by the entropy of the model's distributions: a bound on their sum, or a threshold for each."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dllm_jax.decoding.policies.base import Commit, Policy, View, best, first_places, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, order


@struct.dataclass
class EntropyBound(Policy):
    """EB-Sampler (arXiv 2505.24857): the surest tokens while their entropies less the largest stay within a bound.

    The sum less the maximum bounds what committing them together loses against one by one. Released gamma: 0.1. The
    paper reports 2 to 3 times the speed without loss.
    """

    gamma: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The largest n with H_1 + ... + H_n - max(H_1, ..., H_n) <= gamma; one always passes."""
        order_BQ = order(prediction.confidence_BQ, view.open_BQ)
        entropy_BQ = jnp.take_along_axis(prediction.entropy_BQ, order_BQ, axis=1)
        others_BQ = jnp.cumsum(entropy_BQ, axis=1) - jax.lax.cummax(entropy_BQ, axis=1)
        passes_BQ = (others_BQ <= self.gamma).at[:, 0].set(True)
        mask_BQ = first_places(order_BQ, view.open_BQ, passes_BQ.sum(axis=1))
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)


@struct.dataclass
class EntropyThreshold(Policy):
    """d3LLM (arXiv 2601.07568): every token of at most the given entropy, and always the one of the least.

    Released with pipelined blocks: value 0.4 to 0.5, add 0.1, ready 0.95.
    """

    value: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The open slots with H <= value, and the best."""
        score_BQ = -prediction.entropy_BQ
        mask_BQ = (view.open_BQ & (prediction.entropy_BQ <= self.value)) | best(score_BQ, view.open_BQ)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state, score_BQ=score_BQ)
