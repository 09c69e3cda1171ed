"""The canvas: prompt columns, left-padded to a common length, then gen_length columns of [MASK] in blocks.

Shape letters: B rows (prompts), L canvas columns, P prompt columns, G generated columns, Q prediction slots.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static shape of a canvas."""

    prompt_length: int  # P, padding included
    gen_length: int  # G
    block_length: int
    slack: int = 0  # columns on the right that only keep the slices of a cached step inside the canvas

    @property
    def length(self) -> int:
        """L = P + G, what the model sees in a full forward."""
        return self.prompt_length + self.gen_length

    @property
    def columns(self) -> int:
        """Columns stored: L and the slack."""
        return self.length + self.slack

    @property
    def num_blocks(self) -> int:
        """Blocks of the generation."""
        return self.gen_length // self.block_length

    def block_start(self, block: Int[Array, "..."]) -> Int[Array, "..."]:
        """First column of a block."""
        return self.prompt_length + block * self.block_length


def bucketed_prompt_length(longest: int, gen_length: int, *, multiple: int, waste: float, most: int) -> int:
    """The prompt columns for a batch: the smallest P >= longest that makes P + gen_length one of few lengths.

    These are multiples of `multiple`: all of them at first, then every second, and so on, such that a canvas is longer
    than it need be by less than a multiple, or else by the share `waste` at most. Few programs are compiled for any
    mixture of prompts, and they do not depend on the decoder.

    Args:
        longest: tokens of the batch's longest prompt, at least 1.
        gen_length: G.
        multiple: of the lengths of canvases.
        waste: at least 0, which allows every multiple.
        most: tokens of the longest prompt that may come: there are no more columns than that one needs.
    """
    length = multiple
    while length < longest + gen_length:
        room = math.floor((length + 1) * (1 + waste)) - length  # for the shortest canvas that this one is too short for
        length += max(room // multiple, 1) * multiple
    largest = max(most, longest) + gen_length
    return min(length, largest + -largest % multiple) - gen_length


def pad_prompts(
    prompts: Sequence[Sequence[int]], geometry: Geometry, *, mask_id: int, pad_id: int
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
    """Lays out a batch on the host.

    Args:
        prompts: token ids of every row, each at most P long.
        geometry: the canvas.
        mask_id: what fills the generated columns.
        pad_id: what fills the left padding and the slack (never attended to).

    Returns:
        tokens_BL int32 and pad_B int32, the first real column of every row.
    """
    tokens_BL = np.full((len(prompts), geometry.columns), pad_id, np.int32)
    tokens_BL[:, geometry.prompt_length : geometry.length] = mask_id
    pad_B = np.array([geometry.prompt_length - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, pad_B[row] : geometry.prompt_length] = prompt
    return tokens_BL, pad_B


def positions(columns: Int[Array, "#B T"], pad_B: Int[Array, "B"]) -> Int[Array, "B T"]:
    """Position of every column in its row's own text; negative (and never looked at) in the padding."""
    return columns - pad_B[:, None]


def columns_from(first: Int[Array, ""] | Int[Array, "B"], *, width: int) -> Int[Array, "#B T"]:
    """The columns [first, first + width), for all rows alike or per row."""
    return jnp.atleast_1d(first)[:, None] + jnp.arange(width)[None, :]


def take_columns(x: Array, first: Int[Array, ""] | Int[Array, "B"], *, width: int) -> Array:
    """The columns [first, first + width) of x [B, L, ...]; the caller keeps them inside.

    One `first` for all rows makes a plain slice, one per row a gather.
    """
    if jnp.ndim(first) == 0:
        return jax.lax.dynamic_slice_in_dim(x, first, width, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width, axis=0))(x, first)


def put_columns(x: Array, new: Array, first: Int[Array, ""] | Int[Array, "B"]) -> Array:
    """Returns x [B, L] with the columns from `first` on replaced by new [B, Q]; the caller keeps them inside."""
    if jnp.ndim(first) == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=0))(
        x, new, first
    )


def between(first_B: Int[Array, "B"], end_B: Int[Array, "B"], *, columns: int) -> Bool[Array, "B L"]:
    """True for the columns [first, end) of every row; from `pad` to `seen` they are what attention may look at."""
    columns_1L = jnp.arange(columns)[None, :]
    return (columns_1L >= first_B[:, None]) & (columns_1L < end_B[:, None])
