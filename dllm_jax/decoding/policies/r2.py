"""R2-dLLM (arXiv 2604.18995, github.com/GATECH-EIC/R2-dLLM): also what stands beside sure tokens, or has not changed.

Four rules, each on the masks that those before it left. Released: threshold 0.9; window 3, window_mean 0.8,
window_known 1; runs; patience 3, stable 0.8 by the last confidence.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, PerSlot, Policy, Sizes, View, best, full
from dllm_jax.decoding.policies.runs import run_heads, run_lengths, run_numbers
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState


class Standing(NamedTuple):
    """How long a slot has proposed its token, and how surely."""

    token_BQ: Int[Array, "B Q"]
    forwards_BQ: Int[Array, "B Q"]  # in a row, up to the last
    sum_BQ: Float[Array, "B Q"]  # of the confidences
    max_BQ: Float[Array, "B Q"]


@struct.dataclass
class R2(Policy):
    """See the methods. Patience or window 0 turn their rules off."""

    threshold: Float[Array, ""]
    window: Int[Array, ""]
    window_mean: Float[Array, ""]
    window_known: Int[Array, ""]
    runs: Bool[Array, ""]
    patience: Int[Array, ""]
    stable: Float[Array, ""]
    stable_by: str = struct.field(pytree_node=False)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> PerSlot:
        """Nothing stands yet."""
        zero_BQ = jnp.zeros((len(state.nfe_B), sizes.slots), jnp.int32)
        return PerSlot(Standing(zero_BQ, zero_BQ, zero_BQ.astype(jnp.float32), zero_BQ.astype(jnp.float32)))

    def commit(self, policy_state: PerSlot, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """By threshold and the best; then by windows, runs and patience."""
        confidence_BQ = prediction.confidence_BQ
        mask_BQ = view.open_BQ & (confidence_BQ >= self.threshold)
        mask_BQ |= best(confidence_BQ, view.open_BQ)
        mask_BQ |= self.windows(view.open_BQ & ~mask_BQ, confidence_BQ, view.block_BQ)
        mask_BQ |= self.heads(view.open_BQ & ~mask_BQ, prediction)
        standing, lasting_BQ = self.lasting(policy_state.value, view.open_BQ & ~mask_BQ, prediction)
        mask_BQ |= lasting_BQ
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), PerSlot(standing))

    def windows(
        self, masked_BQ: Bool[Array, "B Q"], confidence_BQ: Float[Array, "B Q"], block_BQ: Bool[Array, "B Q"]
    ) -> Bool[Array, "B Q"]:
        """The masks of windows inside the block with few known columns and sure masks on average."""
        slot_Q = jnp.arange(masked_BQ.shape[1])
        offset_QQ = slot_Q[None, :] - slot_Q[:, None]
        window_QQ = (offset_QQ >= 0) & (offset_QQ < self.window)  # first slot, slot
        inside_BQ = (window_QQ[None] & block_BQ[:, None, :]).sum(axis=2) == self.window
        in_window_BQQ = window_QQ[None] & masked_BQ[:, None, :]
        masks_BQ = in_window_BQQ.sum(axis=2)
        mean_BQ = jnp.where(in_window_BQQ, confidence_BQ[:, None, :], 0).sum(axis=2) / jnp.maximum(masks_BQ, 1)
        passes_BQ = inside_BQ & (masks_BQ > 0) & (self.window - masks_BQ <= self.window_known)
        passes_BQ &= mean_BQ >= self.window_mean
        return (in_window_BQQ & passes_BQ[:, :, None]).any(axis=1)

    def heads(self, masked_BQ: Bool[Array, "B Q"], prediction: Prediction) -> Bool[Array, "B Q"]:
        """The surest of every run of at least two masks that propose the same token, if it is sure enough."""
        number_BQ = run_numbers(masked_BQ, prediction.token_BQ)
        is_head_BQ = run_heads(number_BQ, prediction.confidence_BQ) & (run_lengths(number_BQ) > 1)
        is_on = self.runs & (self.window > 0)
        return is_head_BQ & (prediction.confidence_BQ > self.window_mean) & is_on

    def lasting(
        self, old: Standing, masked_BQ: Bool[Array, "B Q"], prediction: Prediction
    ) -> tuple[Standing, Bool[Array, "B Q"]]:
        """Counts how long tokens stand, and those that have stood for long and are sure enough."""
        confidence_BQ = prediction.confidence_BQ
        stands_BQ = (old.forwards_BQ > 0) & (prediction.token_BQ == old.token_BQ)
        new = Standing(
            prediction.token_BQ,
            jnp.where(stands_BQ, old.forwards_BQ, 0) + 1,
            jnp.where(stands_BQ, old.sum_BQ, 0) + confidence_BQ,
            jnp.maximum(jnp.where(stands_BQ, old.max_BQ, 0), confidence_BQ),
        )
        value_BQ = {"last": confidence_BQ, "ave": new.sum_BQ / new.forwards_BQ, "max": new.max_BQ}[self.stable_by]
        is_long_BQ = (new.forwards_BQ >= self.patience) & (self.patience > 0)
        return new, masked_BQ & is_long_BQ & (value_BQ >= self.stable)
