"""LocalLeap (arXiv 2510.07081, as in github.com/lizhuo-luo/DAWN): near a sure token less confidence is enough.

Released: threshold 0.9, relaxed 0.75, radius 4.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dllm_jax.decoding.policies.base import Commit, Policy, View, best, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise


@struct.dataclass
class LocalLeap(Policy):
    """Anchors are open positions of at least the threshold; at most `radius` columns from one the relaxed one holds."""

    threshold: Float[Array, ""]
    relaxed: Float[Array, ""]
    radius: Int[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The open slots that reach their threshold, at least the best."""
        confidence_BQ, slot_Q = prediction.confidence_BQ, jnp.arange(view.open_BQ.shape[1])
        anchor_BQ = view.open_BQ & (confidence_BQ >= self.threshold)
        near_QQ = jnp.abs(slot_Q[:, None] - slot_Q[None, :]) <= self.radius
        is_near_BQ = (anchor_BQ[:, None, :] & near_QQ[None]).any(axis=2)
        sure_BQ = view.open_BQ & (confidence_BQ >= jnp.where(is_near_BQ, self.relaxed, self.threshold))
        mask_BQ = sure_BQ | best(confidence_BQ, view.open_BQ)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)
