"""When a row ends before its last block: at the end of its text (EoTP, Learn2PD, arXiv 2509.25188, section 3.3)."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import is_any


@struct.dataclass
class EndOfText:
    """Cuts a row behind a predicted end of text, which need not have been written.

    Without a cache it is looked for in the whole generation, else in the current block, as released.
    """

    min_confidence: Float[Array, ""]  # 0 as released
    end_ids: tuple[int, ...] = struct.field(pytree_node=False)  # tokens that end a text; as released: EoS alone

    def end(
        self, end_B: Int[Array, "B"], *, prediction: Prediction, open_BS: Bool[Array, "B S"],
        accepted_BS: Bool[Array, "B S"], column_BS: Int[Array, "#B S"],
    ) -> Int[Array, "B"]:  # fmt: skip
        """Behind the first end that a filter accepted, else behind the most confident one, else as before.

        Args:
            end_B: one past the last column of every row.
            prediction: for S positions.
            open_BS: positions before the end that were masked when they were predicted.
            accepted_BS: positions whose token a filter accepts.
            column_BS: canvas column of every position, S in a row.
        """
        confidence_BS = prediction.confidence_BQ
        ends_BS = open_BS & is_any(prediction.token_BQ, self.end_ids) & (confidence_BS >= self.min_confidence)
        first_B = jnp.min(jnp.where(ends_BS & accepted_BS, column_BS, end_B[:, None]), axis=1)
        surest_B = column_BS[:, 0] + jnp.argmax(jnp.where(ends_BS, confidence_BS, -jnp.inf), axis=1)
        last_B = jnp.where(first_B < end_B, first_B, jnp.where(ends_BS.any(axis=1), surest_B, end_B - 1))
        return jnp.minimum(last_B + 1, end_B)
