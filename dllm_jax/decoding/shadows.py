"""Shadows: one more masked column for every slot, which shows what the model says where it cannot see the slot's token.

A forward with shadows has Q columns behind the canvas, all [MASK], where the logits of the slots are made. The canvas
does not see them. The shadow of a slot sees the canvas without the slot's column, and all shadows (WINO, arXiv
2507.18578).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Shadowed(NamedTuple):
    """The columns of a forward with shadows, T = L + Q."""

    tokens_BT: Int[Array, "B T"]
    column_BT: Int[Array, "B T"]  # where they stand in the canvas
    real_BT: Bool[Array, "B T"]
    pattern_BTT: Bool[Array, "B T T"]  # what a column sees of the others


def shadowed(
    tokens_BL: Int[Array, "B L"], real_BL: Bool[Array, "B L"], slot_BQ: Int[Array, "#B Q"], *, mask_id: int, shift: int
) -> Shadowed:
    """The canvas with the shadows of slots behind it.

    Args:
        tokens_BL: of the canvas.
        real_BL: columns that hold text.
        slot_BQ: column of every slot.
        mask_id: the shadows' token.
        shift: columns left of a slot where its logits are made; there its shadow stands.
    """
    (batch, length), slots = tokens_BL.shape, slot_BQ.shape[1]
    slot_BQ = jnp.broadcast_to(slot_BQ, (batch, slots))
    column_BL = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    return Shadowed(
        jnp.pad(tokens_BL, ((0, 0), (0, slots)), constant_values=mask_id),
        jnp.concatenate([column_BL, slot_BQ - shift], axis=1),
        jnp.pad(real_BL, ((0, 0), (0, slots)), constant_values=True),
        pattern(real_BL, slot_BQ),
    )


def pattern(real_BL: Bool[Array, "B L"], slot_BQ: Int[Array, "#B Q"]) -> Bool[Array, "B T T"]:
    """What every column of a forward with shadows sees, T = L + Q.

    Args:
        real_BL: columns that hold text.
        slot_BQ: column of every slot.
    """
    (batch, length), slots = real_BL.shape, slot_BQ.shape[1]
    is_own_BQL = slot_BQ[:, :, None] == jnp.arange(length)[None, None, :]
    canvas_BLL = jnp.broadcast_to(real_BL[:, None, :], (batch, length, length))
    of_canvas_BLT = jnp.pad(canvas_BLL, ((0, 0), (0, 0), (0, slots)))
    of_shadows_BQL = real_BL[:, None, :] & ~is_own_BQL
    of_shadows_BQT = jnp.pad(of_shadows_BQL, ((0, 0), (0, 0), (0, slots)), constant_values=True)
    return jnp.concatenate([of_canvas_BLT, of_shadows_BQT], axis=1)
