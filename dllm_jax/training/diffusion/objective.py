"""What a masked diffusion model learns: the tokens behind the masks, at every noise level.

The loss is LLaDA's (arXiv 2502.09992, equations 3 and 5): a level t is drawn for every sample, each token of its answer
is masked with probability t, and the cross-entropy of the masked ones is weighed by 1/t. Two things may be added for
models that shall need fewer forwards. Masks may lie as a decoding leaves them: blocks before one that is open are
clean and those behind it masked (dParallel, arXiv 2509.26488), and those that the model itself committed last are
masked first (d3LLM, arXiv 2601.07568). And the entropy of what is predicted right already may be lowered (dParallel's
certainty-forcing), since certain tokens are committed together.

Shape letters: B rows, L columns, C columns of a slice, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dllm_jax.data.canvases import Canvases
from dllm_jax.models.layers import wide
from dllm_jax.models.transformer import Transformer
from dllm_jax.training.diffusion.config import ObjectiveSettings
from dllm_jax.training.losses import Sums, in_slices

MOST_FORWARDS = 2**16  # of a decode, more than any bound
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, lie evenly however many there are


@struct.dataclass
class Noised:
    """Canvases with masks."""

    tokens_BL: Int[Array, "B L"]  # what the model sees
    target_BL: Int[Array, "B L"]  # what it should predict
    weight_BL: Float[Array, "B L"]  # of every prediction in the loss; 0 where nothing is predicted
    scale_BL: Float[Array, "B L"]  # of its sample in the loss, for terms that have no weight of their own
    samples_B: Float[Array, "B"]  # samples in the row whose loss counts
    positions_BL: Int[Array, "B L"]
    segments_BL: Int[Array, "B L"]


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """The objective of a masked diffusion model.

    Args:
        settings: how masks are drawn and what counts.
        mask_id: of [MASK].
    """

    settings: ObjectiveSettings
    mask_id: int

    def prepare(self, batch: Canvases, key: Array) -> Noised:
        """Draws a noise level for every sample, stratified over the batch, and masks tokens of its answer."""
        tokens_BL, noised_BL, padding_BL, positions_BL, segments_BL, order_BL = map(jnp.asarray, batch)
        level_key, block_key, token_key = jax.random.split(key, 3)
        level_BL = self._levels(segments_BL, level_key)
        open_BL, behind_BL = self._open(noised_BL, padding_BL, segments_BL, block_key)
        masked_BL = open_BL & (self._draws(open_BL, order_BL, segments_BL, token_key) < level_BL)
        counts_BL = jnp.where(padding_BL, self.settings.padding_weight, 1.0) * open_BL
        length_BL = _per_segment(jax.ops.segment_sum, counts_BL, segments_BL)
        scale_BL = jnp.where(masked_BL, counts_BL, 0) / jnp.where(length_BL > 0, length_BL, 1)
        begins_BL = (positions_BL == 0) & (segments_BL > 0)
        return Noised(
            tokens_BL=jnp.where(masked_BL | behind_BL, self.mask_id, tokens_BL),
            target_BL=tokens_BL,
            weight_BL=scale_BL / level_BL if self.settings.weighting == "linear" else scale_BL,
            scale_BL=scale_BL,
            samples_B=jnp.sum(begins_BL & (length_BL > 0), axis=1, dtype=jnp.float32),
            positions_BL=positions_BL,
            segments_BL=segments_BL,
        )

    def sums(self, module: Transformer, batch: Noised) -> Sums:
        """The loss of noised canvases; its weight is the number of samples.

        Args:
            module: a model that is not causal.
            batch: from `prepare`.
        """
        hidden_BLD, _ = module(
            batch.tokens_BL, batch.positions_BL, real_BS=batch.segments_BL > 0, segment_BT=batch.segments_BL
        )
        hidden_BLD = jnp.roll(hidden_BLD, module.config.logit_shift, axis=1)  # a shifted model predicts one further
        beside = (batch.target_BL, batch.weight_BL, batch.scale_BL)
        of_slice = functools.partial(
            _slice_sums, certainty=self.settings.certainty, temperature=self.settings.certainty_temperature
        )
        loss, correct, tokens = in_slices(module, hidden_BLD, beside, of_slice)
        return Sums(loss=loss, weight=jnp.sum(batch.samples_B), correct=correct, tokens=tokens)

    def _levels(self, segments_BL: Int[Array, "B L"], key: Array) -> Float[Array, "B L"]:
        """The noise level of every token's sample: the rows have one each of B equal parts of (least_noise, 1)."""
        rows = len(segments_BL)
        order_key, offset_key = jax.random.split(key)
        part_B = jax.random.permutation(order_key, rows) + jax.random.uniform(offset_key, (rows,))
        level_BL = (part_B[:, None] / rows + segments_BL * GOLDEN) % 1
        least = self.settings.least_noise
        return least + (1 - least) * level_BL

    def _open(
        self,
        noised_BL: Bool[Array, "B L"],
        padding_BL: Bool[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        key: Array,
    ) -> tuple[Bool[Array, "B L"], Bool[Array, "B L"]]:
        """Where tokens may be masked, and where all of them are: behind the block that is drawn, if blocks are.

        Drawn are the blocks of the answer and the first that is padding alone; those behind it look like it.
        """
        if not self.settings.block_length:
            return noised_BL, jnp.zeros_like(noised_BL)
        before_BL = jnp.cumsum(noised_BL, axis=1) - noised_BL  # in the row
        first_BL = _per_segment(jax.ops.segment_min, jnp.where(noised_BL, before_BL, noised_BL.shape[1]), segments_BL)
        block_BL = (before_BL - first_BL) // self.settings.block_length  # in the sample's answer
        answer_BL = noised_BL & ~padding_BL
        last_BL = _per_segment(jax.ops.segment_max, jnp.where(noised_BL, block_BL, 0), segments_BL)
        blocks_BL = 1 + _per_segment(jax.ops.segment_max, jnp.where(answer_BL, block_BL + 1, 0), segments_BL)
        draw_key, share_key = jax.random.split(key)
        draw_BL, share_BL = (
            (jax.random.uniform(each, (len(noised_BL), 1)) + segments_BL * GOLDEN) % 1 for each in (draw_key, share_key)
        )
        drawn_BL = (draw_BL * jnp.minimum(blocks_BL, 1 + last_BL)).astype(jnp.int32)
        in_blocks_BL = share_BL < self.settings.block_share
        return (
            noised_BL & (~in_blocks_BL | (block_BL == drawn_BL)),
            noised_BL & in_blocks_BL & (block_BL > drawn_BL),
        )

    def _draws(
        self, open_BL: Bool[Array, "B L"], order_BL: Int[Array, "B L"], segments_BL: Int[Array, "B L"], key: Array
    ) -> Float[Array, "B L"]:
        """A number in [0, 1) for every token, which is masked if that is below the level of its sample.

        In the order of a trajectory it is the share of the sample's open tokens that were committed later.
        """
        draws_BL = jax.random.uniform(key, open_BL.shape)
        if self.settings.order == "random":
            return draws_BL
        known_BL = open_BL & (order_BL > 0)
        first_BL = segments_BL * MOST_FORWARDS  # a number for every forward of every sample, in their order
        forward_BL = jnp.where(known_BL, first_BL + order_BL, jnp.iinfo(jnp.int32).max)
        sorted_BL = jnp.sort(forward_BL, axis=1)

        def up_to(forward_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
            """Known tokens of the row that were committed up to a forward."""
            return jax.vmap(lambda known, asked: jnp.searchsorted(known, asked, side="right"))(sorted_BL, forward_BL)

        end_BL = up_to(first_BL + MOST_FORWARDS - 1)
        share_BL = (end_BL - up_to(forward_BL)) / jnp.maximum(end_BL - up_to(first_BL), 1)
        return jnp.where(known_BL, share_BL, draws_BL)


def _per_segment(
    reduce: Callable[..., Array], values_BL: Shaped[Array, "B L"], segments_BL: Int[Array, "B L"]
) -> Array:
    """For every token the sum, or the like, over its sample [B, L].

    Args:
        reduce: one of `jax.ops.segment_*`.
        values_BL: of every token.
        segments_BL: its sample.
    """
    count = values_BL.shape[1] + 1
    return jax.vmap(lambda values, segments: reduce(values, segments, num_segments=count)[segments])(
        values_BL, segments_BL
    )


def _slice_sums(
    logits_BCV: Float[Array, "B C V"],
    target_BC: Int[Array, "B C"],
    weight_BC: Float[Array, "B C"],
    scale_BC: Float[Array, "B C"],
    *,
    certainty: float,
    temperature: float,
) -> tuple[Array, Array, Array]:
    """Loss, tokens predicted right, tokens predicted."""
    predicted_BC = weight_BC > 0
    loss_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, target_BC) * weight_BC
    right_BC = predicted_BC & (jnp.argmax(logits_BCV, axis=-1) == target_BC)
    if certainty:
        log_p_BCV = jax.nn.log_softmax(wide(logits_BCV) / temperature)
        entropy_BC = -jnp.sum(jnp.exp(log_p_BCV) * log_p_BCV, axis=-1)
        loss_BC = loss_BC + certainty * jnp.where(right_BC, entropy_BC * scale_BC, 0)
    return (
        jnp.sum(loss_BC, where=predicted_BC),
        jnp.sum(right_BC, dtype=jnp.float32),
        jnp.sum(predicted_BC, dtype=jnp.float32),
    )
