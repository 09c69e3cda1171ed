"""From settings to the axes of a decode: blocks, cache, stop rule. Policies: `policies/build.py`."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from dllm_jax.config import Config
from dllm_jax.decoding.blocks import Adaptive, Aligned, Blocks, Counted, Growing, Pipelined, Sliding
from dllm_jax.decoding.caching import BlockCache, CacheStrategy, FinalCache, NoCache, SlidingCache, WindowCache
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.stopping import Both, EndOfBlock, EndOfText, Settled, StopRule
from dllm_jax.errors import UsageError
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.settings import POLICY_FITS, block_schedule, check_model, check_schedule, check_steps, token_ids


class Axes(NamedTuple):
    """What decides which columns are open and which run."""

    blocks: Blocks
    cache: CacheStrategy


def suited(config: Config, model: TransformerConfig) -> Config:
    """The settings with what is left to the model filled in: the cache, the length of blocks, the steps of a block.

    Args:
        config: all settings.
        model: the diffusion model.

    Raises:
        UsageError: they do not suit it.
    """
    decode = config.decode
    if decode.cache == "auto":
        kept = model.block_causal and "block" in POLICY_FITS[decode.policy].caches
        decode = dataclasses.replace(decode, cache="block" if kept else "none")
    check_model(decode, family=model.family, block_causal=model.block_causal)
    if not model.block_causal:
        check_schedule(decode)
        return dataclasses.replace(config, decode=decode)
    block_length = decode.block_length or model.causal_block
    open_length = decode.sub_block_length or block_length
    if block_length % open_length or open_length <= model.logit_shift:
        raise UsageError(
            f"decode.sub_block_length: expected a divisor of decode.block_length {block_length}, "
            f"above {model.logit_shift}, got {open_length}"
        )
    blocks = -(-decode.gen_length // block_length)
    check_steps(blocks, decode.steps)
    decode = dataclasses.replace(decode, block_length=block_length, steps=decode.steps or blocks * block_length)
    return dataclasses.replace(config, decode=decode)


def has_counted_blocks(config: Config, model: TransformerConfig) -> bool:
    """Whether blocks are counted from a row's first token; APD's lookahead goes over the ends of blocks."""
    return model.block_causal and config.decode.policy != "apd"


def build_geometry(config: Config, model: TransformerConfig, *, prompt_length: int) -> Geometry:
    """The canvas, without slack; `config` is `suited`.

    With blocks that are counted from a row's first token it has room for the whole of the last one.
    """
    decode = config.decode
    if not has_counted_blocks(config, model):
        return Geometry(prompt_length, decode.gen_length, block_schedule(decode)[0])
    blocks = -(-(decode.gen_length - 1) // decode.block_length) + 1
    return Geometry(prompt_length, blocks * decode.block_length, decode.block_length)


def build_axes(config: Config, model: TransformerConfig, *, in_step: bool = True) -> Axes:
    """The blocks and the cache strategy of the settings.

    Args:
        config: all settings, `suited`.
        model: the diffusion model.
        in_step: all rows of a batch begin at the same time.
    """
    decode = config.decode
    if has_counted_blocks(config, model):
        open_length, cached = decode.sub_block_length or decode.block_length, decode.cache == "block"
        blocks = Counted(
            block_length=decode.block_length,
            open_length=open_length,
            gen_length=decode.gen_length,
            logit_shift=model.logit_shift,
            cached=cached,
        )
        alone = open_length if decode.sub_block_cache and open_length < decode.block_length else 0
        assert model.mask_id is not None
        return Axes(blocks, FinalCache(decode.block_length, model.mask_id, alone) if cached else NoCache())
    others = build_blocks(config, in_step=in_step)
    return Axes(others, build_cache(config, others, logit_shift=model.logit_shift))


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
        case "block_eos" | "early_eos":
            return EndOfBlock(end_ids, early=config.decode.stop == "early_eos")
    return None


def lookahead(config: Config) -> int:
    """Tokens that `apd` drafts."""
    return min(config.apd.max_lookahead or config.decode.gen_length, config.decode.gen_length)
