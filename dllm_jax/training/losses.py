"""From hidden states to sums over the tokens of a batch, without the logits of all of it at once; next-token loss.

Shape letters: B rows, T tokens of a row, C tokens of a slice of it, D model width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from dllm_jax.data.packing import Batch
from dllm_jax.mesh import batch_multiple
from dllm_jax.models.transformer import Transformer

LOGIT_BYTES = 2**28  # float32 logits at a time on a device; a real vocabulary has gigabytes of them in a batch


@struct.dataclass
class Sums:
    """Sums over a batch, or a part of one."""

    loss: Float[Array, ""]  # in nats
    weight: Float[Array, ""]  # what the loss is divided by to be a mean
    correct: Float[Array, ""]  # predicted tokens that were the most likely ones
    tokens: Float[Array, ""]  # predicted tokens


def means(parts: Sequence[Sums]) -> dict[str, float]:
    """Loss and token accuracy over several batches; 0 if nothing in them counts."""
    loss, weight, correct, tokens = (
        math.fsum(float(getattr(part, field.name)) for part in parts) for field in dataclasses.fields(Sums)
    )
    return {"loss": loss / max(weight, 1), "token_accuracy": correct / max(tokens, 1)}


@dataclasses.dataclass(frozen=True)
class NextTokens:
    """The objective of a causal model: every token of an answer from what comes before it in the same sample."""

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is; nothing is drawn."""
        return batch

    def sums(self, module: Transformer, batch: Batch) -> Sums:
        """How well a model predicts the answers of packed samples.

        Args:
            module: a causal language model.
            batch: rows whose samples all begin with a prompt, so that no answer follows another sample directly.
        """
        tokens_BT, is_answer_BT, positions_BT, segments_BT = map(jnp.asarray, batch)
        hidden_BTD, _ = module(tokens_BT, positions_BT, real_BS=segments_BT > 0, segment_BT=segments_BT)
        target_BT = jnp.roll(tokens_BT, -1, axis=1)
        counted_BT = jnp.roll(is_answer_BT, -1, axis=1).at[:, -1].set(False)
        return in_slices(module, hidden_BTD, (target_BT, counted_BT), _answer_sums)


def _answer_sums(logits_BCV: Array, target_BC: Array, counted_BC: Array) -> Sums:
    loss_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, target_BC)
    correct_BC = jnp.argmax(logits_BCV, axis=-1) == target_BC
    tokens = jnp.sum(counted_BC, dtype=jnp.float32)
    return Sums(
        loss=jnp.sum(loss_BC, where=counted_BC),
        weight=tokens,
        correct=jnp.sum(correct_BC, where=counted_BC, dtype=jnp.float32),
        tokens=tokens,
    )


def in_slices(
    module: Transformer, hidden_BTD: Float[Array, "B T D"], beside: tuple[Array, ...], of_slice: Callable[..., Any]
) -> Any:
    """Sums over the columns of what logits give, which are made for some columns at a time, backwards again.

    Args:
        module: whose head makes the logits.
        hidden_BTD: what it makes them of.
        beside: arrays [B, T] that `of_slice` needs.
        of_slice: from logits [B, C, V] and slices [B, C] of `beside` to a tree of scalars.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = hidden_BTD.shape[0] if mesh.empty else -(-hidden_BTD.shape[0] // batch_multiple(mesh))
    length = hidden_BTD.shape[1]
    pieces = _pieces(rows * length * module.config.vocab_size * 4, length)
    sliced = [jnp.stack(jnp.split(x, pieces, axis=1)) for x in (hidden_BTD, *beside)]
    made = jax.lax.map(jax.checkpoint(lambda piece: of_slice(module.unembed(piece[0]), *piece[1:])), sliced)
    return jax.tree.map(jnp.sum, made)


def _pieces(logit_bytes: int, length: int) -> int:
    """How many equal slices of a row keep the logits of one within bounds."""
    divisors = [pieces for pieces in range(1, length + 1) if length % pieces == 0]
    return next((pieces for pieces in divisors if logit_bytes <= pieces * LOGIT_BYTES), length)
