"""Which keys and values are kept between forwards.

A full forward at a block's start makes those of the whole canvas. Until every row has left the block, cached steps
run only the columns [block start, block start + width) against them and overwrite their own; the rest stays as it
was, the prompt and other blocks frozen (Fast-dLLM, arXiv 2505.22618, section 3.2). A strategy is no more than a table
of those widths.
"""

import dataclasses
from collections.abc import Callable

from dllm_jax.decoding.canvas import Geometry

MAX_WIDTHS = 4  # of a prefix step, and
MAX_LENGTHS = 4  # of a canvas: every one is one more model to compile


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


# For every block of a canvas, the width of its cached steps.
StepWidths = Callable[[Geometry], tuple[int, ...]]
STEP_WIDTHS: dict[str, StepWidths] = {"none": no_widths, "prefix": prefix_widths, "dual": dual_widths}


def needed_columns(widths: tuple[int, ...], geometry: Geometry) -> int:
    """Columns that hold the canvas and every step's slice (one that stuck out would be moved left silently)."""
    ends = [geometry.prompt_length + geometry.block_length * block + width for block, width in enumerate(widths)]
    return max([geometry.length, *ends])


def shorter_canvases(geometry: Geometry, *, multiple: int) -> tuple[Geometry, ...]:
    """The canvas cut at a few generation lengths, the whole one first: what a batch runs on whose rows ended early.

    Args:
        geometry: the canvas.
        multiple: the lengths are multiples of this, a whole number of blocks if there is a cache.
    """
    quarters = [-(-geometry.gen_length * i // MAX_LENGTHS) for i in range(MAX_LENGTHS, 0, -1)]
    lengths = [min(-(-length // multiple) * multiple, geometry.gen_length) for length in quarters]
    return tuple(dataclasses.replace(geometry, gen_length=length) for length in dict.fromkeys(lengths))
