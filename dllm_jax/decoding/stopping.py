"""When a row ends before its last block: the axis `decode.stop`. Rules compose."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import is_any


class Look(NamedTuple):
    """What a rule sees of a step: S positions, all of the generation or those of the policy."""

    prediction: Prediction
    column_BS: Int[Array, "#B S"]  # canvas column of every position
    open_BS: Bool[Array, "B S"]  # masked when they were predicted, before the end
    accepted_BS: Bool[Array, "B S"]  # positions whose token a filter accepts
    decoded_B: Float[Array, "B"]  # share of the row's generation that was committed before the step


class Ending(NamedTuple):
    """A rule's answer."""

    end_B: Int[Array, "B"]  # one past the last column of every row; may only fall
    fill_B: Bool[Array, "B"] | None = None  # rows whose open positions among the S are all committed now


@runtime_checkable
class StopRule(Protocol):
    """Ends rows. A `flax.struct.dataclass`, like a policy."""

    @property
    def everywhere(self) -> bool:
        """Whether S is all of the generation where a forward runs all of it; else it is the policy's positions."""

    def apply(self, end_B: Int[Array, "B"], look: Look) -> Ending:
        """Where rows end, and which are committed whole."""

    def never(self) -> "StopRule":
        """A rule of the same cost that never acts, for benchmarks."""


@struct.dataclass
class EndOfText:
    """Cuts a row behind a predicted end of text, which need not have been written (EoTP, arXiv 2509.25188, 3.3).

    Without a cache it is looked for in the whole generation, else in the current block, as released.
    """

    min_confidence: Float[Array, ""]  # 0 as released
    end_ids: tuple[int, ...] = struct.field(pytree_node=False)  # tokens that end a text; as released: EoS alone

    @property
    def everywhere(self) -> bool:
        """Without a cache."""
        return True

    def apply(self, end_B: Int[Array, "B"], look: Look) -> Ending:
        """Behind the first end that a filter accepted, else behind the most confident one, else as before."""
        confidence_BS = look.prediction.confidence_BQ
        is_end_BS = is_any(look.prediction.token_BQ, self.end_ids) & (confidence_BS >= self.min_confidence)
        ends_BS = look.open_BS & is_end_BS
        column_BS = jnp.broadcast_to(look.column_BS, ends_BS.shape)
        first_B = jnp.min(jnp.where(ends_BS & look.accepted_BS, column_BS, end_B[:, None]), axis=1)
        surest_B = jnp.argmax(jnp.where(ends_BS, confidence_BS, -jnp.inf), axis=1)
        surest_B = jnp.take_along_axis(column_BS, surest_B[:, None], axis=1)[:, 0]
        last_B = jnp.where(first_B < end_B, first_B, jnp.where(ends_BS.any(axis=1), surest_B, end_B - 1))
        return Ending(jnp.minimum(last_B + 1, end_B))

    def never(self) -> "EndOfText":
        """No confidence is enough."""
        return dataclasses.replace(self, min_confidence=jnp.float32(jnp.inf))


@struct.dataclass
class Settled:
    """Commits all that is left when the model has made up its mind.

    That is when the mean margin (best logit minus second) of the masks clears a threshold, which falls evenly from
    `early` to `late` with the share of the generation decoded: Prophet (arXiv 2508.19982) and SchED (arXiv 2512.02892),
    whose thresholds fall with the share of the steps. With a cache it looks at, and commits, the current block.
    """

    early: Float[Array, ""]
    late: Float[Array, ""]

    @property
    def everywhere(self) -> bool:
        """Without a cache."""
        return True

    def apply(self, end_B: Int[Array, "B"], look: Look) -> Ending:
        """Fills the rows whose mean margin is large enough."""
        open_BS = look.open_BS & (look.column_BS < end_B[:, None])
        margin_BS = jnp.where(open_BS, look.prediction.margin_BQ, 0)
        mean_B = margin_BS.sum(axis=1) / jnp.maximum(open_BS.sum(axis=1), 1)
        threshold_B = self.early + (self.late - self.early) * look.decoded_B
        return Ending(end_B, fill_B=mean_B >= threshold_B)

    def never(self) -> "Settled":
        """No margin is enough."""
        most = jnp.finfo(jnp.float32).max
        return Settled(early=jnp.float32(most), late=jnp.float32(most))


@struct.dataclass
class EndOfBlock:
    """Ends a row with the block in which a committed token ends its text, as models of block diffusion do.

    Attributes:
        end_ids: tokens that end a text.
        early: it ends at such a token, as soon as nothing before it is masked.
    """

    end_ids: tuple[int, ...] = struct.field(pytree_node=False)
    early: bool = struct.field(pytree_node=False)

    @property
    def everywhere(self) -> bool:
        """It looks at what was committed only."""
        return False

    def first_end(self, tokens_BL: Int[Array, "B L"], among_BL: Bool[Array, "B L"]) -> Int[Array, "B"]:
        """The first column of some that holds such a token; L if there is none."""
        is_end_BL = is_any(tokens_BL, self.end_ids) & among_BL
        return jnp.where(is_end_BL.any(axis=1), jnp.argmax(is_end_BL, axis=1), tokens_BL.shape[1])

    def apply(self, end_B: Int[Array, "B"], look: Look) -> Ending:
        """As before: what was committed is looked at when the row goes on (`closing.py`)."""
        return Ending(end_B)

    def never(self) -> "EndOfBlock":
        """No token ends a text."""
        return dataclasses.replace(self, end_ids=())


@struct.dataclass
class Both:
    """One rule, then another on what it left."""

    first: StopRule
    second: StopRule

    @property
    def everywhere(self) -> bool:
        """Where one of them looks."""
        return self.first.everywhere or self.second.everywhere

    def apply(self, end_B: Int[Array, "B"], look: Look) -> Ending:
        """The end that the rules lead to; a row is filled if one of them says so."""
        before = self.first.apply(end_B, look)
        after = self.second.apply(before.end_B, look)
        if before.fill_B is None or after.fill_B is None:
            return Ending(after.end_B, after.fill_B if before.fill_B is None else before.fill_B)
        return Ending(after.end_B, before.fill_B | after.fill_B)

    def never(self) -> "Both":
        """Both never act."""
        return Both(self.first.never(), self.second.never())
