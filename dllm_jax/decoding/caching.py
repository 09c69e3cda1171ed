"""Which columns a forward runs, and which keys and values are kept between forwards.

A full forward makes the keys and values of the whole canvas. Cached steps then run a slice of it against them and
overwrite the slice's own; the rest stays as it was. `BlockCache` holds Fast-dLLM's caches (arXiv 2505.22618, section
3.2): the slice begins at the block's start, and the cache is made afresh at every block. `WindowCache` is APD's (arXiv
2506.00413): the slice follows each row's first mask, and the cache is made once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.state import DecodeState

MAX_WIDTHS = 4  # of a prefix step, and
MAX_LENGTHS = 4  # of a canvas, the whole one included: every one is one more model to compile


class Span(NamedTuple):
    """Where a forward looks, in canvas columns."""

    first: Int[Array, ""] | Int[Array, "B"]  # first column of a cached step's slice, for all rows or per row
    slot: Int[Array, ""] | Int[Array, "B"]  # column of the first prediction slot, likewise
    seen_B: Int[Array, "B"]  # one past the last column that is attended to
    run_B: Int[Array, "B"] | None = None  # from this column on the cache stays as it is; None: a slice writes all


class CacheStrategy(Protocol):
    """Places the forwards of a decode. Hashable: a part of the program."""

    def slots(self, geometry: Geometry) -> int:
        """Prediction slots of a forward."""

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """For every block, the width of its cached steps' slice; empty without cached steps."""

    def columns(self, geometry: Geometry) -> int:
        """Columns that hold the canvas and every slice (one that stuck out would be moved left silently)."""

    def span(self, state: DecodeState, geometry: Geometry) -> Span:
        """Where the next forward looks."""


StepWidths = Callable[[Geometry], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class BlockCache:
    """Rows decode block by block; with cached steps, all rows of a batch the same block.

    Attributes:
        step_widths: the cache, one of `BLOCK_CACHES`.
        lead: columns that a slice begins before its block: 1 for a model whose logits are made one position earlier.
        keeps_tail: what lies behind a row's end when it falls stays in the cache as it was, and is attended to, until
            the cache is made afresh; else it vanishes at once. As released: with the dual cache, whose steps do not
            run it.
    """

    step_widths: StepWidths
    lead: int
    keeps_tail: bool = False

    def slots(self, geometry: Geometry) -> int:
        """The block."""
        return geometry.block_length

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """See the functions below."""
        return tuple(width + self.lead for width in self.step_widths(geometry))

    def columns(self, geometry: Geometry) -> int:
        """A prefix step's slice, which begins `lead` columns before its block, may be wider than what follows."""
        starts = [geometry.prompt_length + geometry.block_length * block for block in range(geometry.num_blocks)]
        widths = self.step_widths(geometry)
        return max([geometry.length, *(start + width for start, width in zip(starts, widths, strict=False))])

    def span(self, state: DecodeState, geometry: Geometry) -> Span:
        """From the block's start. With cached steps all active rows are in one block: its column holds for all rows."""
        block = current_block(state)
        slot = geometry.block_start(block if self.widths(geometry) else state.block_B)
        first = geometry.block_start(block) - self.lead
        if self.keeps_tail:
            return Span(first=first, slot=slot, seen_B=state.cached_end_B, run_B=state.end_B)
        return Span(first=first, slot=slot, seen_B=state.end_B)


def no_widths(geometry: Geometry) -> tuple[int, ...]:
    """No cache: every step runs the whole canvas, and rows advance through their blocks on their own."""
    return ()


def prefix_widths(geometry: Geometry) -> tuple[int, ...]:
    """Prefix cache: the block and all that follows run, at the narrowest of a few widths that holds them."""
    blocks = geometry.num_blocks
    count = min(blocks, MAX_WIDTHS)
    sizes = [-(-blocks * i // count) for i in range(1, count + 1)]  # in blocks, evenly spread up to all of them
    return tuple(
        geometry.block_length * min(size for size in sizes if size >= blocks - block) for block in range(blocks)
    )


def dual_widths(geometry: Geometry) -> tuple[int, ...]:
    """Dual cache: only the block runs."""
    return (geometry.block_length,) * geometry.num_blocks


@dataclasses.dataclass(frozen=True)
class WindowCache:
    """Rows decode from left to right, each from its own cursor u on, the column behind its last commit.

    A forward sees the columns before u + M. Those from u - W on are run, and before them the ones whose tokens the last
    step committed (their keys and values are of masks).

    Attributes:
        kv_window: W, at least 1; 0 keeps no cache.
        lookahead: M, at most gen_length.
    """

    kv_window: int
    lookahead: int

    def slots(self, geometry: Geometry) -> int:
        """The tokens looked ahead."""
        return self.lookahead

    def widths(self, geometry: Geometry) -> tuple[int, ...]:
        """Room for the window: W - 1, the a tokens accepted last, and the lookahead."""
        width = min(self.kv_window - 1 + self._reach(geometry), geometry.length)
        return (width,) * geometry.num_blocks if self.kv_window else ()

    def columns(self, geometry: Geometry) -> int:
        """A slice, and the slots, may begin at any cursor."""
        return geometry.length + self._reach(geometry)

    def span(self, state: DecodeState, geometry: Geometry) -> Span:
        """Begins at u - W - a + 1, and u + M is not seen."""
        cursor_B = geometry.prompt_length + jnp.sum(state.commit_step_BL > 0, axis=1)
        is_last_BL = (state.commit_step_BL > 0) & (state.commit_step_BL == state.nfe_B[:, None])
        accepted_B = jnp.sum(is_last_BL, axis=1)
        return Span(
            first=jnp.maximum(cursor_B - self.kv_window - accepted_B + 1, 0),
            slot=cursor_B,
            seen_B=jnp.minimum(cursor_B + self.lookahead, state.end_B),
        )

    def _reach(self, geometry: Geometry) -> int:
        """The most that a row accepts in one step and looks ahead in the next."""
        return min(2 * self.lookahead, geometry.gen_length)


def current_block(state: DecodeState) -> Int[Array, ""]:
    """The first block that a live row decodes; with cached steps, the block of all of them."""
    return jnp.min(jnp.where(state.live_B, state.block_B, jnp.iinfo(jnp.int32).max))


BLOCK_CACHES: dict[str, StepWidths] = {"none": no_widths, "prefix": prefix_widths, "dual": dual_widths}


def shorter_canvases(geometry: Geometry, *, multiple: int) -> tuple[Geometry, ...]:
    """The canvas cut at a few generation lengths, the whole one first: what a batch runs on whose rows ended early.

    Args:
        geometry: the canvas.
        multiple: they are shorter by multiples of this.
    """
    quarters = [-(-geometry.gen_length * i // MAX_LENGTHS) for i in range(MAX_LENGTHS, 0, -1)]
    lengths = [geometry.gen_length - (geometry.gen_length - length) // multiple * multiple for length in quarters]
    return tuple(dataclasses.replace(geometry, gen_length=length) for length in dict.fromkeys(lengths))
