"""Fast-dLLM++ (arXiv 2606.02955, github.com/Ringo-Star/FastdLLM_plusplus): a Fréchet bound on the tokens' joint.

The probability that n tokens are all right is at least their sum less n - 1, however they depend on each other. The
released margin is 0.25.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dllm_jax.decoding.policies.base import Commit, Policy, View, first_places, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, order


@struct.dataclass
class Frechet(Policy):
    """Commits the n surest tokens, n the largest with r_1 + ... + r_n + r_n < 1 - delta for r = 1 - c; at least one."""

    delta: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The left side never falls with n: the n that pass are counted."""
        order_BQ = order(prediction.confidence_BQ, view.open_BQ)
        risk_BQ = 1 - jnp.take_along_axis(prediction.confidence_BQ, order_BQ, axis=1)
        passes_BQ = jnp.cumsum(risk_BQ, axis=1) + risk_BQ < 1 - self.delta
        mask_BQ = first_places(order_BQ, view.open_BQ, jnp.maximum(passes_BQ.sum(axis=1), 1))
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)
