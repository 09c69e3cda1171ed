"""A decode's parts, and the forwards of its model.

Columns are counted in the canvas. `Slots` are those for which tokens are predicted, of the policy or of all the
generation; a forward runs all columns of the canvas, or the slice of them that its cache strategy names.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding import canvas, shadows
from dllm_jax.decoding.blocks import Blocks, Counted
from dllm_jax.decoding.caching import CacheStrategy, Column, Span
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Policy, Sizes
from dllm_jax.decoding.prediction import Prediction, Sampler, paired, predict_slots
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stopping import StopRule
from dllm_jax.models.attention import Looks, Watch
from dllm_jax.models.cache import Cache
from dllm_jax.models.transformer import Transformer


class Carry(NamedTuple):
    """What the loop carries: the driver's state and the policy's."""

    state: DecodeState
    policy_state: Any


class Slots(NamedTuple):
    """Columns of every row for which tokens are predicted."""

    first: Column
    width: int

    def all(self) -> Int[Array, "#B Q"]:
        """All of them."""
        return canvas.columns_from(self.first, width=self.width)


class Forward(NamedTuple):
    """What a forward of the columns [first, first + T) gives."""

    hidden: Float[Array, "rows T D"]  # twice the rows under guidance
    first: Column
    looks: Looks | None = None  # the attention of the policy's slots, if it wants that
    shadow: Float[Array, "rows Q D"] | None = None  # of the shadows of the policy's slots, if it wants those

    @property
    def columns(self) -> int:
        """Columns that ran."""
        return self.hidden.shape[1] + (0 if self.shadow is None else self.shadow.shape[1])


def classes(part: Any) -> tuple[type, ...]:
    """The classes of a dataclass and of those inside it, in order.

    JAX takes two dataclasses with as many fields for the same structure, whatever their classes, and with it, if their
    hashes are alike in a few bits, the program of one for that of the other.
    """
    if dataclasses.is_dataclass(part):
        inner = [getattr(part, field.name) for field in dataclasses.fields(part)]
        return (type(part), *(kind for each in inner for kind in classes(each)))
    if isinstance(part, tuple | list):
        return tuple(kind for each in part for kind in classes(each))
    return ()


@struct.dataclass
class Engine:
    """A decode's parts, as one pytree: an argument of the compiled program, where the model is put together."""

    graphdef: nnx.GraphDef
    params: nnx.State
    policy: Policy
    blocks: Blocks
    sampler: Sampler
    noise: Noise
    stop: StopRule | None  # None: rows end with their last block
    block_limit: Int[Array, ""] | None  # forwards a block may take; None: as many as its policy wants
    # The canvas, and shorter ones behind it: a batch runs on the shortest that holds its live rows. More than one pays
    # only if rows can end early, in blocks that they have not reached.
    canvases: tuple[Geometry, ...] = struct.field(pytree_node=False)
    cache: CacheStrategy = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)
    kinds: tuple[type, ...] = struct.field(pytree_node=False)  # `classes` of policy, blocks, stop rule and noise

    @property
    def geometry(self) -> Geometry:
        """The whole canvas."""
        return self.canvases[0]

    @property
    def model(self) -> Transformer:
        """The diffusion model; costs nothing inside a program."""
        return nnx.merge(self.graphdef, self.params)

    @property
    def most_forwards(self) -> int | Int[Array, ""]:
        """The most forwards that a row can need."""
        forwards = self.policy.most_forwards(self.geometry)
        if self.blocks.closes:
            forwards += self.geometry.num_blocks + 1  # the prompt's forward, and those that close blocks
        if self.block_limit is None:
            return forwards
        return jnp.maximum(forwards, self.block_limit * self.geometry.num_blocks)

    def unfinished(
        self, state: DecodeState, rows_B: Bool[Array, "B"], *, fewest: Int[Array, ""] | None = None
    ) -> Bool[Array, ""]:
        """The condition of a loop over steps that each count for one of the rows at least.

        Args:
            state: before the next step.
            rows_B: for which it would count.
            fewest: as many rows may be left; None: none.
        """
        goes_on = rows_B.any() if fewest is None else rows_B.sum() > fewest
        return goes_on & (state.iterations < self.most_forwards * len(rows_B))

    def served(self, state: DecodeState) -> Bool[Array, "B"]:
        """The rows for which the next cached step counts; the others wait for a full one."""
        return state.live_B & ~self.cache.stale(state)

    @property
    def looks_everywhere(self) -> bool:
        """Whether a forward predicts all positions, for the stop rule; else those of the policy."""
        return self.stop is not None and self.stop.everywhere and not self.cache.widths(self.geometry)

    def start(self, state: DecodeState) -> Carry:
        """The carry before the first forward."""
        if isinstance(self.blocks, Counted):
            end_B = self.blocks.ends(state.pad_B, self.geometry)
            waits_B = self.blocks.waits(state.pad_B, self.geometry)
            state = dataclasses.replace(state, end_B=end_B, cached_end_B=end_B, closing_B=waits_B)
        start_B, end_B = self.blocks.begin(state, self.masked(state), self.geometry)
        state = dataclasses.replace(state, block_start_B=start_B, block_end_B=end_B)
        sizes = Sizes(self.blocks.width(self.geometry), self.model.config.vocab_size)
        return Carry(state, self.policy.init(state, self.geometry, sizes))

    def narrowest(self, state: DecodeState, widths: tuple[int, ...]) -> Int[Array, ""]:
        """Which of the widths, in ascending order, the next cached step needs to hold its rows."""
        span = self.cache.span(state, self.slots(state).first)
        needed = jnp.max(jnp.where(self.served(state), span.end_B - span.first, 0))
        return jnp.minimum(jnp.sum(jnp.array(widths) < needed), len(widths) - 1)

    def slots(self, state: DecodeState) -> Slots:
        """The slots of the policy."""
        first = self.blocks.first_slot(state, self.geometry)
        if self.blocks.on_grid and self.cache.widths(self.geometry):  # all rows that count are in one block
            first = jnp.min(jnp.where(state.live_B, first, self.geometry.length))
        return Slots(first, self.blocks.width(self.geometry))

    def whole(self, length: int) -> Slots:
        """All blocks that begin before `length`."""
        blocks = -(-(length - self.geometry.prompt_length) // self.geometry.block_length)
        return Slots(jnp.int32(self.geometry.prompt_length), blocks * self.geometry.block_length)

    def masked(self, state: DecodeState) -> Bool[Array, "B L"]:
        """Masks of the generation, before the row's end."""
        first_B = jnp.full_like(state.end_B, self.geometry.prompt_length)
        is_text_BL = canvas.between(first_B, state.end_B, columns=self.geometry.columns)
        return (state.tokens_BL == self.mask_id) & is_text_BL

    def predict(self, state: DecodeState, forward: Forward, slots: Slots, *, logits: bool = False) -> Prediction:
        """What the model says about the slots.

        Args:
            state: before the step.
            forward: that ran the slots; they may stick out where nothing is open.
            slots: any.
            logits: whether `logits_BQV` is asked for. If not, there are few logits at once, of one block.
        """
        shift = self.model.config.logit_shift
        left = slots.width if self.blocks.fixed_slots and self.cache.widths(self.geometry) else shift
        hidden = jnp.pad(forward.hidden, ((0, 0), (left, slots.width), (0, 0)))
        offset = left + slots.first - shift - forward.first
        hidden = canvas.take_columns(hidden, self.paired(offset), width=slots.width)
        width = self.geometry.block_length
        if logits or slots.width <= width:
            return self._predict(state, hidden, slots)
        blocks = -(-slots.width // width)
        hidden = jnp.pad(hidden, ((0, 0), (0, blocks * width - slots.width), (0, 0)))

        def of_block(offset: Int[Array, ""]) -> Prediction:
            part = jax.lax.dynamic_slice_in_dim(hidden, offset, width, axis=1)
            prediction = self._predict(state, part, Slots(slots.first + offset, width))
            return dataclasses.replace(prediction, logits_BQV=prediction.logits_BQV[..., :0], gumbel_BQV=None)

        def joined(x: Array) -> Array:
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * width, *x.shape[3:])[:, : slots.width]

        return jax.tree.map(joined, jax.lax.map(of_block, jnp.arange(0, blocks * width, width)))

    def shadow(
        self, state: DecodeState, shadow: Float[Array, "rows Q D"], slots: Slots, token_BQ: Int[Array, "B Q"]
    ) -> Float[Array, "B Q"]:
        """The probability that shadows give to the tokens of their slots."""
        probability_BQV = jax.nn.softmax(self._predict(state, shadow, slots).logits_BQV, axis=-1)
        return jnp.take_along_axis(probability_BQV, token_BQ[..., None], axis=-1)[..., 0]

    def whole_canvas(self, state: DecodeState, forward: Forward) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
        """Which of a forward's columns hold a token, and how sure the model is of its own at every column."""
        columns, shift = forward.hidden.shape[1], self.model.config.logit_shift
        greedy = dataclasses.replace(self, sampler=self.sampler.greedy())
        confidence_BT = greedy.predict(state, forward, Slots(jnp.int32(0), columns)).confidence_BQ
        is_text_BT = canvas.between(state.pad_B + shift, state.end_B, columns=columns)  # that a column predicts
        return is_text_BT & (state.tokens_BL[:, :columns] != self.mask_id), confidence_BT

    def _predict(self, state: DecodeState, hidden: Float[Array, "rows Q D"], slots: Slots) -> Prediction:
        gumbel_BQV = None
        if self.sampler.stochastic:
            position_BQ = jnp.broadcast_to(slots.all() - self.geometry.prompt_length, (len(state.nfe_B), slots.width))
            vocab_size = self.model.config.vocab_size
            gumbel_BQV = self.noise.gumbel(state.row_B, state.decided, position_BQ, vocab_size=vocab_size)
        return predict_slots(self.model.unembed(hidden), self.sampler, noise=gumbel_BQV)

    def run(
        self, state: DecodeState, span: Span, *, width: int, keys: int, cache: Cache | None = None
    ) -> tuple[Forward, Cache]:
        """The model on the columns [first, first + width) of every row (twice the rows under guidance)."""
        tokens_BT = canvas.take_columns(state.tokens_BL, span.first, width=width)
        columns = canvas.columns_from(span.first, width=width)
        if self.sampler.guided:
            is_prompt = columns < self.geometry.prompt_length
            tokens_BT = paired(tokens_BT, jnp.where(is_prompt, self.mask_id, tokens_BT))
        positions_BT = self.paired(canvas.positions(columns, state.pad_B))
        real_BS = self.paired(canvas.between(state.pad_B, span.seen_B, columns=keys))
        kept = None if span.run_B is None else self.paired(columns >= span.run_B[:, None])
        hidden, cache = self.model(
            tokens_BT, positions_BT, real_BS=real_BS, cache=cache, start=self.paired(span.first), kept_BT=kept
        )
        return Forward(hidden, span.first), cache

    def look_closer(self, state: DecodeState, slots: Slots, *, length: int) -> tuple[Forward, Cache]:
        """A forward of the canvas with what the policy wants besides: attention, or shadows behind the canvas."""
        wants, shift = self.policy.wants, self.model.config.logit_shift
        tokens_BT, columns = state.tokens_BL[:, :length], jnp.arange(length)[None]
        real_BT, pattern_BTT = canvas.between(state.pad_B, state.end_B, columns=length), None
        if wants.shadow:
            both = shadows.shadowed(tokens_BT, real_BT, slots.all(), mask_id=self.mask_id, shift=shift)
            tokens_BT, columns, real_BT, pattern_BTT = both
        if self.sampler.guided:
            is_prompt = columns < self.geometry.prompt_length
            tokens_BT = paired(tokens_BT, jnp.where(is_prompt, self.mask_id, tokens_BT))
        hidden, cache, looks = self.model.watched(
            tokens_BT,
            self.paired(canvas.positions(columns, state.pad_B)),
            real_BS=self.paired(real_BT),
            pattern_BTS=None if pattern_BTT is None else self.paired(pattern_BTT),
            watch=Watch(self.paired(slots.first - shift), slots.width, wants.attention) if wants.attention else None,
        )
        if looks is not None and self.sampler.guided:
            looks = jax.tree.map(lambda x: x[::2], looks)  # of the rows with their prompt
        shadow = hidden[:, length:] if wants.shadow else None
        return Forward(hidden[:, :length], jnp.int32(0), looks, shadow), cache

    def paired(self, x: Array) -> Array:
        """Under guidance, every row of x twice: for its canvas and the promptless copy. A scalar holds for all rows."""
        return paired(x, x) if self.sampler.guided and jnp.ndim(x) else x
