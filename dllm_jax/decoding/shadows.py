"""Shadows: one more masked column for every slot, which shows what the model says where it cannot see the slot's token.

A forward with shadows has Q columns behind the canvas, all [MASK], where the logits of the slots are made. The canvas
does not see them. The shadow of a slot sees the canvas without the slot's column, and all shadows (WINO, arXiv
2507.18578).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def pattern(real_BL: Bool[Array, "B L"], column_BQ: Int[Array, "#B Q"]) -> Bool[Array, "B T T"]:
    """What every column of a forward with shadows sees, T = L + Q.

    Args:
        real_BL: columns that hold text.
        column_BQ: of every slot.
    """
    (batch, length), slots = real_BL.shape, column_BQ.shape[1]
    is_own_BQL = column_BQ[:, :, None] == jnp.arange(length)[None, None, :]
    canvas_BLL = jnp.broadcast_to(real_BL[:, None, :], (batch, length, length))
    of_canvas_BLT = jnp.pad(canvas_BLL, ((0, 0), (0, 0), (0, slots)))
    of_shadows_BQL = real_BL[:, None, :] & ~is_own_BQL
    of_shadows_BQT = jnp.pad(of_shadows_BQL, ((0, 0), (0, 0), (0, slots)), constant_values=True)
    return jnp.concatenate([of_canvas_BLT, of_shadows_BQT], axis=1)
