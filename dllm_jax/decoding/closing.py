"""What happens between two blocks of a row, if they are counted from its first token: see `blocks.Counted`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding import canvas
from dllm_jax.decoding.blocks import Counted
from dllm_jax.decoding.engine import Engine
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stopping import EndOfBlock


def crossed(
    engine: Engine,
    state: DecodeState,
    *,
    start_B: Int[Array, "B"],
    active_B: Bool[Array, "B"],
    leave_B: Bool[Array, "B"],
) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Rows whose next forward closes the block that they leave; and one past every row's last column.

    Args:
        engine: the decode's parts.
        state: after the step, but for the range.
        start_B: of the next range.
        active_B: rows that the forward counts for.
        leave_B: of which those that leave their range.
    """
    blocks = engine.blocks
    if not isinstance(blocks, Counted):
        return state.closing_B, state.end_B
    crosses_B = leave_B & blocks.is_first(start_B, state.pad_B)
    closing_B = jnp.where(active_B, crosses_B & blocks.closes, state.closing_B)
    if not isinstance(engine.stop, EndOfBlock):
        return closing_B, state.end_B
    is_generated_BL = canvas.between(
        jnp.full_like(start_B, engine.geometry.prompt_length), state.end_B, columns=engine.geometry.columns
    )
    first_end_B = engine.stop.first_end(state.tokens_BL, is_generated_BL)
    is_behind_B = active_B & (state.closing_B if blocks.closes else crosses_B) & (first_end_B < start_B)
    last_B = jnp.where(is_behind_B, jnp.minimum(start_B, state.end_B), state.end_B)
    if not engine.stop.early:
        return closing_B, last_B
    columns_1L = jnp.arange(engine.geometry.columns)[None, :]
    if engine.model.config.logit_shift:  # as released, not where a token comes from the block before
        is_generated_BL &= ~blocks.is_first(columns_1L, state.pad_B[:, None])
    early_B = engine.stop.first_end(state.tokens_BL, is_generated_BL)
    is_masked_BL = engine.masked(state) & (columns_1L < early_B[:, None])
    is_early_B = active_B & ~state.closing_B & (early_B < state.end_B) & ~is_masked_BL.any(axis=1)
    return closing_B & ~is_early_B, jnp.where(is_early_B, early_B + 1, last_B)
