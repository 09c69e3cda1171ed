"""What a decode carries from step to step, and what it returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry


@struct.dataclass
class DecodeState:
    """The carry of the decoding loop. Only the driver writes it; every count is of the row's own forwards."""

    tokens_BL: Int[Array, "B L"]  # the canvas and its slack
    commit_step_BL: Int[Array, "B L"]  # k: committed in the row's k-th forward; 0: not (yet)
    confidence_BL: Float[Array, "B L"]  # of the committed tokens, when they were committed
    row_B: Int[Array, "B"]  # index of the prompt in the whole job: random draws depend on it, not on the slot
    pad_B: Int[Array, "B"]  # first column of the prompt
    end_B: Int[Array, "B"]  # one past the row's last column; may fall
    cached_end_B: Int[Array, "B"]  # what it was in the last full forward, which made the cache
    cached_nfe_B: Int[Array, "B"]  # forwards spent on the row before that one
    block_start_B: Int[Array, "B"]  # first column of the open range, see `blocks.py`
    block_end_B: Int[Array, "B"]  # one past its last column, if the row does not end before
    block_nfe_B: Int[Array, "B"]  # forwards spent on that block
    closing_B: Bool[Array, "B"]  # the next forward is of the block before, whose tokens are final: see `Counted`
    nfe_B: Int[Array, "B"]  # forwards spent on the row
    closed_B: Int[Array, "B"]  # of which those that only closed a block
    live_B: Bool[Array, "B"]  # not finished
    failed_B: Bool[Array, "B"]  # ended by non-finite numbers or by the bound on forwards, not by the decoder
    iterations: Int[Array, ""]  # forwards of the batch
    columns: Int[Array, ""]  # canvas columns those forwards ran, per row
    log: Any = None  # what the policy reports, set at the end

    @property
    def decided(self) -> Int[Array, "B"]:
        """Forwards in which a policy decided: they are the same with a cache that is exact as with none."""
        return self.nfe_B - self.closed_B

    @classmethod
    def start(
        cls, tokens_BL: jax.Array, *, pad_B: jax.Array, row_B: jax.Array, live_B: jax.Array, geometry: Geometry
    ) -> "DecodeState":
        """The state before the first forward; rows that only fill up the batch are not live.

        The open range is still empty, at the end of the prompt: `Engine.start` lets the blocks begin.
        """
        zero_B = jnp.zeros_like(pad_B)
        end_B, prompt_end_B = zero_B + geometry.length, zero_B + geometry.prompt_length
        return cls(
            tokens_BL=tokens_BL,
            commit_step_BL=jnp.zeros_like(tokens_BL),
            confidence_BL=jnp.zeros(tokens_BL.shape, jnp.float32),
            row_B=row_B,
            pad_B=pad_B,
            end_B=end_B,
            cached_end_B=end_B,
            cached_nfe_B=zero_B,
            block_start_B=prompt_end_B,
            block_end_B=prompt_end_B,
            block_nfe_B=zero_B,
            closing_B=jnp.zeros_like(live_B),
            nfe_B=zero_B,
            closed_B=zero_B,
            live_B=live_B,
            failed_B=jnp.zeros_like(live_B),
            iterations=jnp.int32(0),
            columns=jnp.int32(0),
        )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the seconds of a decode went."""

    compile_seconds: float  # tracing, lowering and compiling; about 0 when the program existed
    decode_seconds: float  # from the first forward to the result on the host
    compilations: int  # programs made
    cache_hits: int  # of which read from the persistent compilation cache

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(
            self.compile_seconds + other.compile_seconds,
            self.decode_seconds + other.decode_seconds,
            self.compilations + other.compilations,
            self.cache_hits + other.cache_hits,
        )


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """What came out, on the host, one entry per prompt in the order given.

    Attributes:
        tokens_BG: generated ids int32 [B, gen_length]; EoS behind the end a stop rule set, the mask id where a decoder
            left a mask.
        nfe_B: int32 [B], the row's own forwards (the number of its single run).
        commit_step_BG: int32 [B, gen_length]; k if the token was committed in the row's k-th forward, else 0.
        confidence_BG: float32 [B, gen_length], the model's confidence in the token when it was committed, else 0.
        end_B: int32 [B], generated positions before the end that a stop rule set; gen_length without one.
        text_end_B: int32 [B], generated positions before the first token that ends a text; gen_length without one.
        num_tokens_B: int32 [B], tokens there; masks are none.
        masks_left_B: int32 [B], positions of tokens_BG that still hold the mask id.
        finish_reason: "eos", another end of text "eot_id", "length", or "error" per row: it met NaN or infinite
            numbers, or its decoder did not come to an end within the forwards it can need.
        iterations: forwards of the batches, idle rows included.
        columns: canvas columns those forwards ran per row: the work done, where forwards differ in width.
        timing: seconds and compilations.
        mask_id: the mask token of the model.
        log: what the policy reports (a `PolicyLog`), None if it does not.
    """

    tokens_BG: np.ndarray
    nfe_B: np.ndarray
    commit_step_BG: np.ndarray
    confidence_BG: np.ndarray
    end_B: np.ndarray
    text_end_B: np.ndarray
    num_tokens_B: np.ndarray
    masks_left_B: np.ndarray
    finish_reason: tuple[str, ...]
    iterations: int
    columns: int
    timing: Timing
    mask_id: int
    log: Any = None

    def text_ids(self, row: int) -> list[int]:
        """The ids of a row's text: up to the first token that ends it, without masks."""
        ids = self.tokens_BG[row, : self.text_end_B[row]]
        return ids[ids != self.mask_id].tolist()
