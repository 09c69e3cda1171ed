"""Next-token loss on the answers of packed rows.

Shape letters: B rows, T tokens of a row, C tokens of a slice of it, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.data.packing import Batch
from dllm_jax.models.transformer import Transformer

LOGIT_BYTES = 2**28  # float32 logits that exist at a time; a real vocabulary has gigabytes of them in a batch


@struct.dataclass
class AnswerSums:
    """Sums over the answer tokens of a batch."""

    loss: Float[Array, ""]  # cross-entropy, in nats
    correct: Float[Array, ""]  # tokens that were the most likely ones
    tokens: Float[Array, ""]


def answer_sums(module: Transformer, batch: Batch) -> AnswerSums:
    """How well a causal model predicts the answers of packed samples from what comes before in the same sample.

    Args:
        module: a causal language model.
        batch: rows whose samples all begin with a prompt, so that no answer follows another sample directly.
    """
    tokens_BT, is_answer_BT, positions_BT, segments_BT = map(jnp.asarray, batch)
    hidden_BTD, _ = module(tokens_BT, positions_BT, real_BS=segments_BT > 0, segment_BT=segments_BT)
    target_BT = jnp.roll(tokens_BT, -1, axis=1)
    counted_BT = jnp.roll(is_answer_BT, -1, axis=1).at[:, -1].set(False)
    pieces = _pieces(tokens_BT.size * module.config.vocab_size * 4, tokens_BT.shape[1])
    sliced = [jnp.stack(jnp.split(x, pieces, axis=1)) for x in (hidden_BTD, target_BT, counted_BT)]
    sums = jax.lax.map(jax.checkpoint(lambda piece: _piece_sums(module, *piece)), sliced)
    return jax.tree.map(jnp.sum, sums)


def _pieces(logit_bytes: int, length: int) -> int:
    """How many equal slices of a row keep the logits of one within bounds."""
    divisors = [pieces for pieces in range(1, length + 1) if length % pieces == 0]
    return next((pieces for pieces in divisors if logit_bytes <= pieces * LOGIT_BYTES), length)


def _piece_sums(
    module: Transformer, hidden_BCD: Float[Array, "B C D"], target_BC: Int[Array, "B C"], counted_BC: Bool[Array, "B C"]
) -> AnswerSums:
    logits_BCV = module.unembed(hidden_BCD)
    loss_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, target_BC)
    correct_BC = jnp.argmax(logits_BCV, axis=-1) == target_BC
    return AnswerSums(
        loss=jnp.sum(loss_BC, where=counted_BC),
        correct=jnp.sum(correct_BC, where=counted_BC, dtype=jnp.float32),
        tokens=jnp.sum(counted_BC, dtype=jnp.float32),
    )
