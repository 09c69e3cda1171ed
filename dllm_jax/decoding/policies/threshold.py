"""Fast-dLLM's parallel commits (arXiv 2505.22618, section 3.3): by a confidence threshold, or by a factor bound."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dllm_jax.decoding.policies.base import Commit, Policy, View, best, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, rank


@struct.dataclass
class Threshold(Policy):
    """Commits every open position of at least the given confidence, and always the most confident one.

    With a decay the threshold falls as the block fills: tau = value (1 - decay (1 - r)), r the masked share of its
    columns (Streaming-dLLM, arXiv 2601.17917; its paper's r is of the block and what follows it).
    """

    value: Float[Array, ""]
    decay: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The open slots with c >= tau, at least the best."""
        share_B = view.open_BQ.sum(axis=-1) / jnp.maximum(view.block_BQ.sum(axis=-1), 1)
        threshold_B = self.value * (1 - self.decay * (1 - jnp.where(view.block_nfe_B == 0, 1, share_B)))
        sure_BQ = view.open_BQ & (prediction.confidence_BQ >= threshold_B[:, None])
        mask_BQ = sure_BQ | best(prediction.confidence_BQ, view.open_BQ)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)


@struct.dataclass
class Factor(Policy):
    """Commits the n most confident open positions, as many as satisfy (n + 1) (1 - c_n) <= f in descending order of c.

    As in the released code the best position needs no test, and a lone failure at the very last one is forgiven.
    """

    value: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The longest run of positions, from the most confident on, that pass the bound."""
        rank_BQ = rank(prediction.confidence_BQ, view.open_BQ)
        place_BQ = rank_BQ + 1  # the n of the bound
        fails_BQ = view.open_BQ & (place_BQ > 1) & (prediction.confidence_BQ < 1 - self.value / (place_BQ + 1))
        masks_B = view.open_BQ.sum(axis=-1)
        passed_B = jnp.min(jnp.where(fails_BQ, rank_BQ, masks_B[:, None]), axis=-1)
        mask_BQ = view.open_BQ & (rank_BQ < self._forgiving(passed_B, masks_B)[:, None])
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)

    def _forgiving(self, passed_B: Int[Array, "B"], masks_B: Int[Array, "B"]) -> Int[Array, "B"]:
        return jnp.where(passed_B == masks_B - 1, masks_B, passed_B)
