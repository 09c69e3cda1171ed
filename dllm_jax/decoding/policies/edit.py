"""LLaDA2.1's loop, which writes over tokens that the model would not choose any more (also SGLang's JointThreshold)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dllm_jax.config import Config
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Parts, Policy, Sizes, View, Wants, full
from dllm_jax.decoding.policies.dynamic import sure_or_best
from dllm_jax.decoding.prediction import Prediction, proposable
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState


@struct.dataclass
class Edit(Policy):
    """Commits what is sure, at least some tokens, and writes over committed ones where another is sure.

    A block without masks is gone over again, until a forward changes nothing.

    Attributes:
        threshold: confidence above which a masked position is committed.
        editing_threshold: confidence above which another token replaces a committed one.
        penalty: taken from the logit of the token to the left, against repetitions; not in a block's first column.
        min_tokens: committed in every forward while there are masks, if no more are sure.
        max_post_steps: most forwards of a block without masks.
        block_length: of the model.
        penalized: whether there is a penalty.
        looks_again: a forward that would be one too many is made, and changes nothing: SGLang's loop, whose forwards
            have a cache, finds the bound out so.
    """

    threshold: Float[Array, ""]
    editing_threshold: Float[Array, ""]
    penalty: Float[Array, ""]
    min_tokens: Int[Array, ""]
    max_post_steps: int = struct.field(pytree_node=False)
    block_length: int = struct.field(pytree_node=False)
    penalized: bool = struct.field(pytree_node=False)
    looks_again: bool = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        """Logits, to take the penalty from."""
        return Wants(logits=self.penalized)

    def most_forwards(self, geometry: Geometry) -> int:
        """A token is committed by every forward that finds a mask; the others of a block are counted."""
        return geometry.num_blocks * (self.block_length + self.max_post_steps + 1)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Int[Array, "B"]:
        """Forwards of the block that found no mask."""
        return jnp.zeros_like(state.nfe_B)

    def commit(self, policy_state: Any, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The sure among the open slots, and the committed ones to write over."""
        token_BQ, confidence_BQ = self._proposed(prediction, view)
        least_B = jnp.full_like(view.nfe_B, self.min_tokens)
        mask_BQ = sure_or_best(confidence_BQ, view.open_BQ, above=self.threshold, least_B=least_B)
        is_other_BQ = (token_BQ != view.token_BQ) & (confidence_BQ > self.editing_threshold)
        found_none_B = ~view.open_BQ.any(axis=-1)
        posts_B = jnp.where(view.block_nfe_B == 0, 0, policy_state) + found_none_B
        edit_BQ = view.block_BQ & ~view.open_BQ & is_other_BQ & (posts_B <= self.max_post_steps)[:, None]
        leave_B = found_none_B & ~edit_BQ.any(axis=-1)
        if not self.looks_again:
            leave_B |= full(view.open_BQ, mask_BQ) & (posts_B >= self.max_post_steps)
        return Commit(mask_BQ, token_BQ, leave_B, posts_B, edit_BQ=edit_BQ, score_BQ=confidence_BQ)

    def _proposed(self, prediction: Prediction, view: View) -> tuple[Int[Array, "B Q"], Float[Array, "B Q"]]:
        """Token and confidence of every slot, after the penalty."""
        if not self.penalized:
            return prediction.token_BQ, prediction.confidence_BQ
        left_BQ = jnp.roll(view.token_BQ, 1, axis=1)
        column_BQ = view.start_B[:, None] + jnp.arange(left_BQ.shape[1])[None, :] - view.pad_B[:, None]
        penalty_BQ = jnp.where(column_BQ % self.block_length == 0, 0, self.penalty)
        is_left_BQV = jnp.arange(prediction.logits_BQV.shape[-1])[None, None, :] == left_BQ[..., None]
        logits_BQV = prediction.logits_BQV - jnp.where(is_left_BQV, penalty_BQ[..., None], 0)
        token_BQ = jnp.argmax(proposable(logits_BQV, prediction.mask_id), axis=-1)
        probability_BQV = jax.nn.softmax(logits_BQV, axis=-1)
        confidence_BQ = jnp.take_along_axis(probability_BQV, token_BQ[..., None], axis=-1)[..., 0]
        return token_BQ.astype(jnp.int32), confidence_BQ


def build(config: Config, parts: Parts) -> Edit:
    """The policy of the settings."""
    edit = config.edit
    return Edit(
        threshold=jnp.float32(edit.threshold),
        editing_threshold=jnp.float32(edit.editing_threshold),
        penalty=jnp.float32(edit.penalty),
        min_tokens=jnp.int32(edit.min_tokens),
        max_post_steps=edit.max_post_steps,
        block_length=parts.block_length,
        penalized=edit.penalty > 0,
        looks_again=config.decode.cache == "block",
    )
