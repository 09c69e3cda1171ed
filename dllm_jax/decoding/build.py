"""From settings to the axes of a decode: blocks, cache, stop rule. Policies: `policies/build.py`."""

from typing import NamedTuple

import jax.numpy as jnp

from dllm_jax.config import Config
from dllm_jax.decoding.blocks import Adaptive, Aligned, Blocks, Growing, Pipelined, Sliding
from dllm_jax.decoding.caching import BlockCache, CacheStrategy, NoCache, SlidingCache, WindowCache
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.stopping import Both, EndOfText, Settled, StopRule
from dllm_jax.settings import block_schedule, token_ids


class Axes(NamedTuple):
    """What decides which columns are open and which run."""

    blocks: Blocks
    cache: CacheStrategy


def build_axes(config: Config, *, logit_shift: int, in_step: bool = True) -> Axes:
    """The blocks and the cache strategy of the settings.

    Args:
        config: all settings.
        logit_shift: the model makes its logits so many columns earlier.
        in_step: all rows of a batch begin at the same time.
    """
    blocks = build_blocks(config, in_step=in_step)
    return Axes(blocks, build_cache(config, blocks, logit_shift=logit_shift))


def build_blocks(config: Config, *, in_step: bool = True) -> Blocks:
    """The open ranges that `decode.blocks` names.

    Args:
        config: all settings.
        in_step: all rows of a batch begin at the same time.

    Raises:
        ValueError: an unknown name (refused earlier).
    """
    decode, block_length = config.decode, block_schedule(config.decode)[0]
    if decode.policy == "apd":  # its open range is its lookahead
        return Sliding(lookahead(config))
    match decode.blocks:
        case "aligned":
            return Aligned(on_grid=in_step)
        case "sliding":
            return Sliding(block_length)
        case "growing":
            return Growing()
        case "adaptive":
            delimiters = token_ids("adaptive.delimiters", config.adaptive.delimiters)
            return Adaptive(jnp.array(delimiters, jnp.int32), jnp.float32(config.adaptive.threshold))
        case "pipelined":
            return Pipelined(add=jnp.float32(config.pipelined.add), ready=jnp.float32(config.pipelined.ready))
    raise ValueError(f"no blocks {decode.blocks!r}")


def build_cache(config: Config, blocks: Blocks, *, logit_shift: int) -> CacheStrategy:
    """The cache strategy that `decode.cache` names, for a model whose logits are made `logit_shift` columns earlier."""
    decode, block_length = config.decode, block_schedule(config.decode)[0]
    if decode.policy == "apd":
        kv_window = config.apd.kv_window if decode.cache == "window" else 0
        return WindowCache(kv_window, lookahead(config))
    width = blocks.width(Geometry(0, decode.gen_length, block_length))
    match decode.cache:
        case "prefix" | "dual":
            return BlockCache(
                runs_suffix=decode.cache == "prefix",
                block_width=width,
                lead=logit_shift,
                on_grid=blocks.on_grid,
                keeps_tail=decode.cache == "dual" and "eot" in decode.stop,
            )
        case "sliding":
            margin, suffix = config.sliding.margin, config.sliding.suffix
            return SlidingCache(block_length, open_width=width, margin=margin, suffix=suffix, lead=logit_shift)
    return NoCache()


def build_stop(config: Config, *, end_ids: tuple[int, ...]) -> StopRule | None:
    """The stop rule that `decode.stop` names, for the tokens that end a text."""
    end_of_text = EndOfText(jnp.float32(config.eot.min_confidence), end_ids)
    settled = Settled(early=jnp.float32(config.settled.early), late=jnp.float32(config.settled.late))
    match config.decode.stop:
        case "eot":
            return end_of_text
        case "settled":
            return settled
        case "eot+settled":
            return Both(end_of_text, settled)
    return None


def lookahead(config: Config) -> int:
    """Tokens that `apd` drafts."""
    return min(config.apd.max_lookahead or config.decode.gen_length, config.decode.gen_length)
