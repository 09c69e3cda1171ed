"""Which columns of a row are open to its policy: the axis `decode.blocks`.

A row's open range [block_start, block_end) stands in the state, one per row; what is masked there, before the row's
end, may be committed. A policy sees it through slots, the same number Q in every step, and does not know the axis.

| axis | open range | published as |
|---|---|---|
| aligned | a block of a fixed grid, until it is full | LLaDA, arXiv 2502.09992 |
| sliding | the B columns from the row's first mask on | DSB (constant), arXiv 2602.05992 |
| growing | as many columns as hold B masks, if the range is filled from the left | DSB (greedy) |
| adaptive | a block to a delimiter, chosen in its first forward | AdaBlock, github.com/lgxi24/AdaBlock-dLLM |
| pipelined | several blocks at once, the next opened before the last is full | d3LLM, arXiv 2601.07568 |

Models whose attention is causal by blocks have `Counted` ones, aligned to the row's own first token.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry, between
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import rank
from dllm_jax.decoding.state import DecodeState

LOOKED_AT = 0.25  # share of the generation in which an adaptive block may end


class Range(NamedTuple):
    """An open range of every row."""

    start_B: Int[Array, "B"]
    end_B: Int[Array, "B"]


class Blocks:
    """The contract, and what most of its axes share. A `flax.struct.dataclass`, like a policy."""

    in_turn: bool = True  # rows leave one block for the next; else the range moves by itself, as one block
    on_grid: bool = False  # rows of one batch that are in the same block are at the same column
    fixed_slots: bool = False  # slots are all of the generation: a slice may begin behind the first
    moves_slots: bool = False  # slots move on while what they look at stays: a policy's state has to move with them

    @property
    def closes(self) -> bool:
        """Whether a block that is done takes one more forward, see `Counted`."""
        return False

    def width(self, geometry: Geometry) -> int:
        """Q, the slots that hold any open range."""
        raise NotImplementedError

    def columns(self, geometry: Geometry) -> int:
        """Columns that hold the canvas and all slots (some that stuck out would be moved left silently)."""
        return geometry.length + self.width(geometry)

    def first_slot(self, state: DecodeState, geometry: Geometry) -> Int[Array, ""] | Int[Array, "B"]:
        """Column of the first slot, for all rows or per row."""
        return state.block_start_B

    def begin(self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry) -> Range:
        """The first range; before it stands an empty one at the end of the prompt."""
        return self.advance(state, masked_BL, geometry, leave_B=jnp.ones_like(state.live_B))

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """The range of the next forward.

        Args:
            state: after the step, but for the range.
            masked_BL: masks before the row's end.
            geometry: of the canvas.
            leave_B: rows that are done with their block.
        """
        raise NotImplementedError

    def has_more(
        self,
        state: DecodeState,
        masked_BL: Bool[Array, "B L"],
        geometry: Geometry,
        *,
        start_B: Int[Array, "B"],
        moved_B: Bool[Array, "B"],
    ) -> Bool[Array, "B"]:
        """Rows that have something to do in a range that begins at `start_B`, or behind it.

        Args:
            state: after the step, but for the range.
            masked_BL: masks before the row's end.
            geometry: of the canvas.
            start_B: of the next range.
            moved_B: rows that have just left a range, or closed a block.
        """
        return start_B < state.end_B

    def settle(
        self, state: DecodeState, prediction: Prediction, columns_BQ: Int[Array, "#B Q"], geometry: Geometry
    ) -> Int[Array, "B"]:
        """The range's end, where a forward decides on it before its policy does."""
        return state.block_end_B

    def complete(
        self,
        mask_BQ: Bool[Array, "B Q"],
        score_BQ: Float[Array, "B Q"],
        open_BQ: Bool[Array, "B Q"],
        geometry: Geometry,
    ) -> Bool[Array, "B Q"]:
        """What is committed, where the axis adds to the policy's choice.

        Args:
            mask_BQ: the choice.
            score_BQ: how sure the policy is of every slot.
            open_BQ: slots that may be chosen.
            geometry: of the canvas.
        """
        return mask_BQ


@struct.dataclass
class Aligned(Blocks):
    """Block after block of a fixed grid.

    Attributes:
        on_grid: with a cache, all rows of a batch are in the same block; else each is in one of its own.
    """

    on_grid: bool = struct.field(pytree_node=False, default=True)

    def width(self, geometry: Geometry) -> int:
        """The block."""
        return geometry.block_length

    def columns(self, geometry: Geometry) -> int:
        """Blocks end with the canvas."""
        return geometry.length

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """The next block for rows that leave theirs."""
        start_B = jnp.where(leave_B, state.block_end_B, state.block_start_B)
        return Range(start_B, start_B + geometry.block_length)


@struct.dataclass
class Sliding(Blocks):
    """The columns from the first mask on, as many as a block has."""

    block_length: int = struct.field(pytree_node=False)

    in_turn = False
    moves_slots = True

    def width(self, geometry: Geometry) -> int:
        """The block."""
        return self.block_length

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """From the first mask; behind the canvas if there is none."""
        start_B = first_true(masked_BL, otherwise=geometry.length)
        return Range(start_B, jnp.minimum(start_B + self.block_length, geometry.length))


class WholeGeneration(Blocks):
    """An axis whose slots are all generated columns, and stay there."""

    in_turn = False
    fixed_slots = True

    def width(self, geometry: Geometry) -> int:
        """All generated columns."""
        return geometry.gen_length

    def columns(self, geometry: Geometry) -> int:
        """No slot sticks out."""
        return geometry.length

    def first_slot(self, state: DecodeState, geometry: Geometry) -> Int[Array, ""]:
        """The first generated column."""
        return jnp.int32(geometry.prompt_length)


@struct.dataclass
class Growing(WholeGeneration):
    """From the first mask to the block length behind the prompt, and a column further for every token committed."""

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """E = P + B + u for u committed tokens."""
        committed_B = state.end_B - geometry.prompt_length - masked_BL.sum(axis=1)
        end_B = geometry.prompt_length + geometry.block_length + committed_B
        start_B = first_true(masked_BL, otherwise=geometry.length)
        return Range(start_B, jnp.minimum(end_B, geometry.length))


@struct.dataclass
class Pipelined(WholeGeneration):
    """Blocks opened one after the other, the next one while the last still has masks.

    A block is full, in the sense of the paper, when the one before it is decoded far enough. The first full block that
    has masks gets a token in every forward, whatever the policy chose.

    Attributes:
        add: committed share of the last open block with which the next is opened, at most one per forward.
        ready: committed share of a block with which the one behind it is full.
    """

    add: Float[Array, ""]
    ready: Float[Array, ""]

    def begin(self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry) -> Range:
        """The first block, and what is opened before its first forward."""
        start_B = jnp.full_like(state.block_end_B, geometry.prompt_length)
        first = dataclasses.replace(state, block_start_B=start_B, block_end_B=start_B + geometry.block_length)
        return self.advance(first, masked_BL, geometry, leave_B=jnp.zeros_like(state.live_B))

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """One more block, if the last open one is decoded far enough. The range begins with the first mask."""
        generated = slice(geometry.prompt_length, geometry.length)
        progress_BN = self._progress(masked_BL[:, generated], geometry)
        last_B = (state.block_end_B - geometry.prompt_length) // geometry.block_length - 1
        progress_B = jnp.take_along_axis(progress_BN, last_B[:, None], axis=1)[:, 0]
        opens_B = (progress_B >= self.add) | (progress_B == 1)
        end_B = jnp.minimum(state.block_end_B + opens_B * geometry.block_length, geometry.length)
        return Range(first_true(masked_BL, otherwise=geometry.length), end_B)

    def complete(
        self,
        mask_BQ: Bool[Array, "B Q"],
        score_BQ: Float[Array, "B Q"],
        open_BQ: Bool[Array, "B Q"],
        geometry: Geometry,
    ) -> Bool[Array, "B Q"]:
        """One more token, if the first full block with masks got none."""
        progress_BN = self._progress(open_BQ, geometry)  # 1 for blocks that are not open: they have no say below
        blocks = progress_BN.shape[1]
        before_BN = jnp.concatenate([jnp.ones_like(progress_BN[:, :1]), progress_BN[:, :-1]], axis=1)
        first_B1 = jnp.argmax((before_BN >= self.ready) & (progress_BN < 1), axis=1)[:, None]
        in_first_BQ = open_BQ & jnp.repeat(jnp.arange(blocks)[None, :] == first_B1, geometry.block_length, axis=1)
        is_best_BQ = in_first_BQ & (rank(score_BQ, in_first_BQ) == 0)
        return mask_BQ | (is_best_BQ & ~(mask_BQ & in_first_BQ).any(axis=1, keepdims=True))

    def _progress(self, masked_BG: Bool[Array, "B G"], geometry: Geometry) -> Float[Array, "B N"]:
        """The committed share of every block."""
        masks_BN = masked_BG.reshape(len(masked_BG), -1, geometry.block_length).sum(axis=2)
        return (geometry.block_length - masks_BN) / geometry.block_length


@struct.dataclass
class Adaptive(Blocks):
    """Blocks that end where a phrase does.

    The first forward of a block looks at the quarter of the generation that follows: the block ends with the surest of
    the delimiters predicted there, if the model is sure enough of it, else after the block length.

    Attributes:
        delimiters_N: token ids.
        threshold: least confidence in a delimiter.
    """

    delimiters_N: Int[Array, "N"]
    threshold: Float[Array, ""]

    def width(self, geometry: Geometry) -> int:
        """The longest block: a quarter of the generation, or the block length."""
        return max(geometry.block_length, int(LOOKED_AT * geometry.gen_length))

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """Behind the block that a row leaves, with room for what its first forward decides."""
        start_B = jnp.where(leave_B, state.block_end_B, state.block_start_B)
        return Range(start_B, jnp.where(leave_B, start_B + self.width(geometry), state.block_end_B))

    def settle(
        self, state: DecodeState, prediction: Prediction, columns_BQ: Int[Array, "#B Q"], geometry: Geometry
    ) -> Int[Array, "B"]:
        """Behind the surest delimiter, or after the block length, in the first forward of a block."""
        limit_B = jnp.minimum(state.block_start_B + int(LOOKED_AT * geometry.gen_length), state.end_B)
        is_delimiter_BQ = jnp.isin(prediction.token_BQ, self.delimiters_N) & (columns_BQ < limit_B[:, None])
        confidence_BQ = jnp.where(is_delimiter_BQ, prediction.confidence_BQ, -jnp.inf)
        ends_B = state.block_start_B + jnp.argmax(confidence_BQ, axis=1) + 1
        else_B = jnp.minimum(state.block_start_B + geometry.block_length, geometry.length)
        end_B = jnp.where(jnp.max(confidence_BQ, axis=1) >= self.threshold, ends_B, else_B)
        return jnp.where(state.block_nfe_B == 0, end_B, state.block_end_B)


@struct.dataclass
class Counted(Blocks):
    """Blocks counted from a row's first token, for models that are causal by blocks (arXiv 2503.09573).

    The first block to be decoded may begin with the end of the prompt, and the last one end behind the tokens asked
    for. Where a block is done its keys and values are not final yet, they are those of its masks: with a cache one more
    forward of it closes it, without commits. A shifted model needs that forward in any case: its last position
    predicts the first token of the next block (Fast-dLLM v2, arXiv 2509.26328).

    Attributes:
        block_length: of the model's mask.
        open_length: columns that are open at once, a divisor of it: the block, or a part of it.
        gen_length: tokens asked for.
        logit_shift: of the model.
        cached: keys and values are kept.
    """

    block_length: int = struct.field(pytree_node=False)
    open_length: int = struct.field(pytree_node=False)
    gen_length: int = struct.field(pytree_node=False)
    logit_shift: int = struct.field(pytree_node=False)
    cached: bool = struct.field(pytree_node=False)

    @property
    def closes(self) -> bool:
        """If anybody needs it."""
        return self.cached or self.logit_shift > 0

    def width(self, geometry: Geometry) -> int:
        """What is open at once."""
        return self.open_length

    def columns(self, geometry: Geometry) -> int:
        """A row that is done may look behind its last block."""
        return geometry.length + self.block_length

    def first_slot(self, state: DecodeState, geometry: Geometry) -> Int[Array, "B"]:
        """Where the part of the block begins that holds the range: slots cover all of it, prompt included."""
        return state.block_start_B - (state.block_start_B - state.pad_B) % self.open_length

    def ends(self, pad_B: Int[Array, "B"], geometry: Geometry) -> Int[Array, "B"]:
        """One past the last column of every row: of the block that holds the last token asked for."""
        tokens_B = geometry.prompt_length - pad_B + self.gen_length
        return pad_B + -(-tokens_B // self.block_length) * self.block_length

    def waits(self, pad_B: Int[Array, "B"], geometry: Geometry) -> Bool[Array, "B"]:
        """Rows whose first forward closes blocks of their prompt."""
        prompt_B = geometry.prompt_length - pad_B
        if self.cached:
            return prompt_B >= self.block_length
        return (prompt_B % self.block_length == 0) & self.closes

    def is_first(self, column: Int[Array, "..."], pad: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a column is the first of a block, in a row that begins at `pad`."""
        return (column - pad) % self.block_length == 0

    def begin(self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry) -> Range:
        """What follows the prompt in its block."""
        return self._from(jnp.full_like(state.pad_B, geometry.prompt_length), state.pad_B)

    def advance(
        self, state: DecodeState, masked_BL: Bool[Array, "B L"], geometry: Geometry, *, leave_B: Bool[Array, "B"]
    ) -> Range:
        """The next part of the block, or the next block."""
        return self._from(jnp.where(leave_B, state.block_end_B, state.block_start_B), state.pad_B)

    def has_more(
        self,
        state: DecodeState,
        masked_BL: Bool[Array, "B L"],
        geometry: Geometry,
        *,
        start_B: Int[Array, "B"],
        moved_B: Bool[Array, "B"],
    ) -> Bool[Array, "B"]:
        """Rows with masks from the range on, and those that stay in theirs, which they may go over again.

        As released, a shifted model decodes as many blocks as have the columns asked for: where the first one holds a
        part of the prompt, these are some tokens fewer. If the blocks do not come out even, all tokens are there.
        """
        if self.logit_shift:
            goal_B = jnp.full_like(start_B, geometry.prompt_length + self.gen_length)
            if self.gen_length % self.block_length == 0:
                goal_B -= (geometry.prompt_length - state.pad_B) % self.block_length
        else:
            goal_B = state.end_B
        return (masked_BL & between(start_B, goal_B, columns=masked_BL.shape[1])).any(axis=1) | ~moved_B

    def _from(self, start_B: Int[Array, "B"], pad_B: Int[Array, "B"]) -> Range:
        return Range(start_B, start_B + self.open_length - (start_B - pad_B) % self.open_length)


def first_true(x_BL: Bool[Array, "B L"], *, otherwise: int) -> Int[Array, "B"]:
    """The first column that is True in every row, else the value given."""
    return jnp.where(x_BL.any(axis=1), jnp.argmax(x_BL, axis=1), otherwise)
