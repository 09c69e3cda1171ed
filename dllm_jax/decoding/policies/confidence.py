"""LLaDA's own sampler (arXiv 2502.09992): a fixed number of tokens per step, the most confident or random ones."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Policy, Sizes, View, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, top_n
from dllm_jax.decoding.state import DecodeState
from dllm_jax.settings import DecodeSettings, block_schedule


def scheduled(masks_B: Int[Array, "B"], step_B: Int[Array, "B"], steps: Int[Array, ""]) -> Int[Array, "B"]:
    """Tokens of a block's step: its masks shared out evenly, the first steps take one more each for the remainder."""
    return masks_B // steps + (step_B < masks_B % steps)


def steps_per_block(decode: DecodeSettings) -> Int[Array, ""]:
    """Steps of a block in the schedule of the settings."""
    block_length, steps = block_schedule(decode)
    return jnp.int32(steps // -(-decode.gen_length // block_length))


@struct.dataclass
class Scheduled(Policy):
    """Commits the scheduled number of open positions, by confidence or in random order.

    Attributes:
        steps_per_block: of the schedule.
        shuffled: the order is random.
        fixed_masks: the schedule is for so many masks (SDAR's static one); 0: for those that the row finds in a block.
    """

    steps_per_block: Int[Array, ""]
    shuffled: bool = struct.field(pytree_node=False, default=False)
    fixed_masks: int = struct.field(pytree_node=False, default=0)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Int[Array, "B"]:
        """Masks of the block when the row entered it."""
        return jnp.zeros_like(state.nfe_B)

    def commit(self, policy_state: Int[Array, "B"], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The best n open slots, n from the schedule."""
        masks_B = jnp.where(view.block_nfe_B == 0, view.open_BQ.sum(axis=-1), policy_state)
        shared_B = jnp.full_like(masks_B, self.fixed_masks) if self.fixed_masks else masks_B
        n_B = jnp.maximum(scheduled(shared_B, view.block_nfe_B, self.steps_per_block), 1)
        mask_BQ = top_n(self._score(prediction, view, noise), view.open_BQ, n_B)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), masks_B)

    def _score(self, prediction: Prediction, view: View, noise: Noise) -> Float[Array, "B Q"]:
        if self.shuffled:
            return noise.uniform(view.row_B, view.nfe_B, view.position_BQ)
        return prediction.confidence_BQ
