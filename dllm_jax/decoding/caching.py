"""Which columns a forward runs, which keys and values are kept between forwards, and when they are made afresh.

A full forward makes the keys and values of the whole canvas. Cached steps then run a slice of it against them and
overwrite the slice's own; the rest stays as it was, until the cache is stale. `BlockCache` holds Fast-dLLM's caches
(arXiv 2505.22618, section 3.2): the slice begins at the block's start, and a cache serves one block. `SlidingCache` is
DSB's: the slice follows the open range, and a cache serves as many commits as a block has columns. `WindowCache` is
APD's (arXiv 2506.00413): the slice follows each row's first mask, and the cache is made once. `FinalCache` is that of
models which are causal by blocks: what it holds of a block that is closed never changes again, so it is exact.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.state import DecodeState

MAX_WIDTHS = 4  # of a step whose slice differs in width, and
MAX_LENGTHS = 4  # of a canvas, the whole one included: every one is one more model to compile

Column = Int[Array, ""] | Int[Array, "B"]  # for all rows or per row


class Span(NamedTuple):
    """Where a forward looks, in canvas columns."""

    first: Column  # first column of a cached step's slice
    end_B: Int[Array, "B"]  # one past the last column that the slice has to hold
    seen_B: Int[Array, "B"]  # one past the last column that is attended to
    run_B: Int[Array, "B"] | None = None  # from this column on the cache stays as it is; None: a slice writes all


@runtime_checkable
class CacheStrategy(Protocol):
    """Places the forwards of a decode. Hashable: a part of the program."""

    keeps_writes: bool  # what a slice writes is seen by slices of other widths
    lasts: bool  # it serves a row to its end; else all rows of a batch wait for each other to make theirs afresh

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """The widths that a cached step's slice may have, in ascending order; empty without cached steps."""

    def columns(self, geometry: Geometry) -> int:
        """Columns that hold the canvas and every slice (one that stuck out would be moved left silently)."""

    def full_columns(self, geometry: Geometry) -> int:
        """Columns of a full forward, on a canvas that may be one of the shorter ones."""

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """Where the next cached step looks."""

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """Rows whose cache has to be made afresh; they wait until that holds for all rows of the batch."""


class OfCanvas:
    """A cache whose full forwards run the canvas."""

    def full_columns(self, geometry: Geometry) -> int:
        """All of it."""
        return geometry.length


@dataclasses.dataclass(frozen=True)
class NoCache(OfCanvas):
    """Every step runs the whole canvas, and rows advance on their own."""

    keeps_writes = False
    lasts = False

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """No cached steps."""
        return ()

    def columns(self, geometry: Geometry) -> int:
        """The canvas."""
        return geometry.length

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """All of the row."""
        return Span(first=jnp.int32(0), end_B=state.end_B, seen_B=state.end_B)

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """Always."""
        return jnp.ones_like(state.live_B)


@dataclasses.dataclass(frozen=True)
class BlockCache(OfCanvas):
    """A cache per block; with cached steps, all rows of a batch are in the same one.

    Attributes:
        runs_suffix: the slice holds what follows the block too (the prefix cache; else the dual cache).
        block_width: columns of the widest block.
        lead: columns that a slice begins before its block: 1 for a model whose logits are made one position earlier.
        on_grid: every block is of `block_width`.
        keeps_tail: what lies behind a row's end when it falls stays in the cache as it was, and is attended to, until
            the cache is made afresh; else it vanishes at once. As released: with the dual cache, whose steps do not
            run it.
    """

    runs_suffix: bool
    block_width: int
    lead: int
    on_grid: bool = True
    keeps_tail: bool = False

    keeps_writes = False  # a slice runs, and writes, all that it sees behind the block's start
    lasts = False

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """The block; with a prefix cache a few widths, evenly spread up to all of the generation."""
        if not self.runs_suffix:
            return (self.block_width + self.lead,)
        unit = geometry.block_length if self.on_grid else 1
        units = geometry.gen_length // unit
        count = min(units, MAX_WIDTHS)
        return tuple(unit * size + self.lead for size in sorted({-(-units * i // count) for i in range(1, count + 1)}))

    def columns(self, geometry: Geometry) -> int:
        """A prefix step's slice may be wider than what follows its block, and a block than what it can hold."""
        widths = self.widths(geometry)
        if not self.on_grid:
            return geometry.length + widths[-1]
        starts = range(geometry.prompt_length, geometry.length, geometry.block_length)
        ends = [start + self._least(widths, geometry.length - start) for start in starts]
        return max(geometry.length, *ends)

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """From the block's start."""
        if self.runs_suffix:
            return Span(first_slot - self.lead, end_B=state.end_B, seen_B=state.end_B)
        seen_B = state.cached_end_B if self.keeps_tail else state.end_B
        run_B = None
        if self.keeps_tail or not self.on_grid:
            run_B = jnp.minimum(state.end_B, state.block_end_B)
        return Span(first_slot - self.lead, end_B=state.block_end_B, seen_B=seen_B, run_B=run_B)

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """In a new block."""
        return state.block_nfe_B == 0

    def _least(self, widths: tuple[int, ...], suffix: int) -> int:
        """Columns behind the block's start of the slice that holds the block, or what follows too."""
        needed = suffix + self.lead if self.runs_suffix else 0
        return next(width for width in widths if width >= needed) - self.lead


@dataclasses.dataclass(frozen=True)
class SlidingCache(OfCanvas):
    """A slice around the open range [s, e), and a fresh cache after so many commits.

    A slice begins before the range, with the columns that s has just passed but at least `margin` of them: their keys
    and values are of masks, or of a text that knew less.

    Attributes:
        block_length: commits that a cache serves, those of the full forward included.
        open_width: columns that the open range may have.
        margin: columns before the range.
        suffix: columns behind it.
        lead: see `BlockCache`.
    """

    block_length: int
    open_width: int
    margin: int
    suffix: int
    lead: int

    keeps_writes = True
    lasts = False

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """Room for the range, and for what it may have passed in one step; a few widths where it can be all."""
        least = max(self.margin, self.block_length, self.lead) + self.block_length + self.suffix
        most = max(self.margin, self.open_width, self.lead) + self.open_width + self.suffix
        least, most = (min(width, geometry.length) for width in (least, most))
        spread = MAX_WIDTHS - 1
        return tuple(sorted({least + -(-(most - least) * i // spread) for i in range(spread + 1)}))

    def columns(self, geometry: Geometry) -> int:
        """A slice may begin anywhere."""
        return geometry.length + self.widths(geometry)[-1]

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """From w columns before the range on."""
        start_B, is_last_BL = state.block_start_B, state.commit_step_BL == state.nfe_B[:, None]
        columns_1L = jnp.arange(is_last_BL.shape[1])[None, :]
        last_start_B = jnp.min(jnp.where(is_last_BL & (state.commit_step_BL > 0), columns_1L, start_B[:, None]), axis=1)
        before_B = jnp.maximum(start_B - last_start_B, max(self.margin, self.lead))
        first_B = jnp.maximum(start_B - before_B, state.pad_B)
        run_B = jnp.minimum(state.block_end_B + self.suffix, state.end_B)
        return Span(first_B, end_B=run_B, seen_B=state.end_B, run_B=run_B)

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """At first, and after as many commits as a block has columns."""
        commits_B = jnp.sum(state.commit_step_BL > state.cached_nfe_B[:, None], axis=1)
        return (state.nfe_B == 0) | (commits_B >= self.block_length)


@dataclasses.dataclass(frozen=True)
class WindowCache(OfCanvas):
    """Rows decode from left to right, each from its own cursor u on, the column behind its last commit.

    A forward sees the columns before u + M, which is the open range. Those from u - W on are run, and before them the
    ones whose tokens the last step committed (their keys and values are of masks).

    Attributes:
        kv_window: W, at least 1; 0 keeps no cache.
        lookahead: M, at most gen_length.
    """

    kv_window: int
    lookahead: int

    keeps_writes = True
    lasts = True

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """Room for the window: W - 1, the a tokens accepted last, and the lookahead."""
        width = min(self.kv_window - 1 + self._reach(geometry), geometry.length)
        return (width,) if self.kv_window else ()

    def columns(self, geometry: Geometry) -> int:
        """A slice, and the slots, may begin at any cursor."""
        return geometry.length + self._reach(geometry)

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """Begins at u - W - a + 1, and u + M is not seen."""
        is_last_BL = (state.commit_step_BL > 0) & (state.commit_step_BL == state.nfe_B[:, None])
        accepted_B = jnp.sum(is_last_BL, axis=1)
        first_B = jnp.maximum(first_slot - self.kv_window - accepted_B + 1, 0)
        end_B = jnp.minimum(state.block_end_B, state.end_B)
        return Span(first_B, end_B=end_B, seen_B=end_B)

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """At first; always without a window."""
        return (state.nfe_B == 0) | (self.kv_window == 0)

    def _reach(self, geometry: Geometry) -> int:
        """The most that a row accepts in one step and looks ahead in the next."""
        return min(2 * self.lookahead, geometry.gen_length)


@dataclasses.dataclass(frozen=True)
class FinalCache:
    """Keys and values of blocks that are closed; a forward runs the row's own block.

    With `part_length` a forward runs only the open part of the block, where nobody needs more: as soon as the part has
    a token in its first column, and the block has been run as a whole (Fast-dLLM v2's block cache). Keys and values of
    the rest of the block are then those of the last forward that ran them.

    Attributes:
        block_length: of the model's mask.
        mask_id: the token of a masked column.
        part_length: columns that are open at once, if they may run alone; 0: they may not.
    """

    block_length: int
    mask_id: int
    part_length: int = 0

    keeps_writes = True
    lasts = True

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """The part, the block."""
        return (self.part_length, self.block_length) if self.part_length else (self.block_length,)

    def columns(self, geometry: Geometry) -> int:
        """A slice may begin with the last part of a block."""
        return geometry.length + self.block_length

    def full_columns(self, geometry: Geometry) -> int:
        """The prompt."""
        return geometry.prompt_length

    def span(self, state: DecodeState, first_slot: Column) -> Span:
        """The block that is decoded, or closed, or its part."""
        column_B = state.block_start_B - state.closing_B
        first_B = column_B - (column_B - state.pad_B) % self.block_length
        behind_B = first_B + self.block_length
        if not self.part_length:
            return Span(first_B, end_B=behind_B, seen_B=behind_B)
        alone_B = self._has_run(state, first_B) & (_at(state.tokens_BL, first_slot) != self.mask_id)
        first_B = jnp.where(alone_B, first_slot, first_B)
        end_B = jnp.where(alone_B, first_slot + self.part_length, behind_B)
        return Span(first_B, end_B=end_B, seen_B=behind_B, run_B=end_B)

    def _has_run(self, state: DecodeState, first_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Rows whose block, from `first_B` on, was run as a whole: for this part of it, or for those before."""
        start_B = state.block_start_B
        is_decoded_B = (start_B > first_B) & (_at(state.commit_step_BL, start_B - 1) > 0)
        return ~state.closing_B & (is_decoded_B | (state.block_nfe_B > 0))

    def stale(self, state: DecodeState) -> Bool[Array, "B"]:
        """At first, if the prompt has a block."""
        return state.closing_B & (state.nfe_B == 0)


def _at(x_BL: Int[Array, "B L"], column: Column) -> Int[Array, "B"]:
    """What stands in a column of every row."""
    return jnp.take_along_axis(x_BL, jnp.broadcast_to(column, len(x_BL))[:, None], axis=1)[:, 0]


def shorter_canvases(geometry: Geometry, *, multiple: int) -> tuple[Geometry, ...]:
    """The canvas cut at a few generation lengths, the whole one first: what a batch runs on whose rows ended early.

    Args:
        geometry: the canvas.
        multiple: they are shorter by multiples of this.
    """
    quarters = [-(-geometry.gen_length * i // MAX_LENGTHS) for i in range(MAX_LENGTHS, 0, -1)]
    lengths = [geometry.gen_length - (geometry.gen_length - length) // multiple * multiple for length in quarters]
    return tuple(dataclasses.replace(geometry, gen_length=length) for length in dict.fromkeys(lengths))
