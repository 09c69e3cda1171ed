"""The one decoding loop. Decoders differ in what is plugged into it, never in a loop of their own.

Every loop's condition reads two elements of the carry, the live rows and the count of forwards. The count bounds the
loop; and with one element alone XLA's trip-count analysis on TPU follows it through the whole body without remembering
where it has been: two layers were not compiled after 15 minutes, and are in 12 seconds so.

An iteration is one forward of the diffusion model: the cache strategy says which columns run, `prediction` turns hidden
states into tokens and confidences, the policy says which are committed, the stop rule where rows end, and `step` (the
only writer of the state) writes that and advances rows. The outer loop's forward sees the whole canvas; with a cache
its keys and values then serve an inner loop of cheaper forwards until the cache is stale.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding import caching, canvas
from dllm_jax.decoding.caching import CacheStrategy, Span
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import CommitPolicy, InPlace, PolicyLog, Reported, View
from dllm_jax.decoding.prediction import Prediction, Sampler, paired, predict_slots
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stopping import EndOfText
from dllm_jax.models.cache import Cache, columns_of, widened
from dllm_jax.models.transformer import Transformer


class Carry(NamedTuple):
    """What the loop carries: the driver's state and the policy's."""

    state: DecodeState
    rows: Any


class Slots(NamedTuple):
    """Columns of every row for which tokens are predicted."""

    first: Int[Array, ""] | Int[Array, "B"]  # for all rows or per row
    width: int

    def all(self) -> Int[Array, "#B Q"]:
        """All of them."""
        return canvas.columns_from(self.first, width=self.width)


@struct.dataclass
class Engine:
    """A decode's parts, as one pytree: an argument of the compiled program, where the model is put together."""

    graphdef: nnx.GraphDef
    params: nnx.State
    policy: CommitPolicy
    sampler: Sampler
    noise: Noise
    stop: EndOfText | None  # None: rows end with their last block
    block_limit: Int[Array, ""] | None  # forwards a block may take; None: as many as its policy wants
    # The canvas, and shorter ones behind it: a batch runs on the shortest that holds its live rows. More than one pays
    # only if rows can end early, in blocks that they have not reached.
    canvases: tuple[Geometry, ...] = struct.field(pytree_node=False)
    cache: CacheStrategy = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)

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
        if self.block_limit is None:
            return forwards
        return jnp.maximum(forwards, self.block_limit * self.geometry.num_blocks)

    def unfinished(self, state: DecodeState, rows_B: Bool[Array, "B"]) -> Bool[Array, ""]:
        """The condition of a loop over steps that each count for one of the rows at least."""
        return rows_B.any() & (state.iterations < self.most_forwards * len(rows_B))

    @property
    def looks_everywhere(self) -> bool:
        """Whether a forward predicts all positions, for the stop rule; else those of the policy."""
        return self.stop is not None and not self.cache.widths(self.geometry)

    def start(self, state: DecodeState) -> Carry:
        """The carry before the first forward."""
        return Carry(state, self.policy.init(state, self.geometry))

    @jax.named_scope("full_step")  # the names stand in the compiled program: `dllm_jax.hlo` finds the loops by them
    def full_step(self, carry: Carry, *, length: int) -> tuple[Carry, Cache]:
        """One iteration with a forward of the canvas; logits only for the prediction slots of every row.

        Args:
            carry: state before the step; no live row ends behind `length`.
            length: columns that run, static.

        Returns:
            The state after the step, and the keys and values of those columns.
        """
        state = dataclasses.replace(carry.state, cached_end_B=carry.state.end_B)
        span = self._span(state)._replace(first=jnp.int32(0), run_B=None)
        slots = self._slots(span)
        if self.block_limit is not None:  # blocks that ran out of forwards may have left masks, which compete again
            slots = self._whole(length)
        predicted = self._whole(length) if self.looks_everywhere else slots
        hidden, cache = self._forward(state, span, width=length, keys=length)
        return self._look(Carry(state, carry.rows), hidden, span, predicted, slots, active_B=state.live_B), cache

    @jax.named_scope("cached_step")
    def cached_step(self, carry: Carry, cache: Cache, *, width: int) -> tuple[Carry, Cache]:
        """One iteration of the rows in the current block, with a forward of a slice of `width` columns.

        Returns:
            The state after the step, and the cache with the slice's own keys and values.
        """
        state, span = carry.state, self._span(carry.state)
        active_B = in_block(state, caching.current_block(state))
        hidden, cache = self._forward(state, span, width=width, keys=columns_of(cache), cache=cache)
        slots = self._slots(span)
        return self._look(carry, hidden, span, slots, slots, active_B=active_B), cache

    def narrowest(self, state: DecodeState, block: Int[Array, ""], widths: list[int]) -> Int[Array, ""]:
        """Which of the widths, in ascending order, the cached steps of a block need to hold its rows."""
        end = jnp.max(jnp.where(in_block(state, block), state.end_B, 0))
        needed = jnp.max(end - self._span(state).first)
        return jnp.minimum(jnp.sum(jnp.array(widths) < needed), len(widths) - 1)

    def _span(self, state: DecodeState) -> Span:
        return self.cache.span(state, self.geometry)

    def _slots(self, span: Span) -> Slots:
        """The slots of the policy."""
        return Slots(span.slot, self.cache.slots(self.geometry))

    def _whole(self, length: int) -> Slots:
        """All blocks that begin before `length`."""
        blocks = -(-(length - self.geometry.prompt_length) // self.geometry.block_length)
        return Slots(jnp.int32(self.geometry.prompt_length), blocks * self.geometry.block_length)

    def _forward(
        self, state: DecodeState, span: Span, *, width: int, keys: int, cache: Cache | None = None
    ) -> tuple[Float[Array, "rows T D"], Cache]:
        """The model on the columns [first, first + width) of every row (twice the rows under guidance)."""
        tokens_BT = canvas.take_columns(state.tokens_BL, span.first, width=width)
        columns = canvas.columns_from(span.first, width=width)
        if self.sampler.guided:
            is_prompt = columns < self.geometry.prompt_length
            tokens_BT = paired(tokens_BT, jnp.where(is_prompt, self.mask_id, tokens_BT))
        positions_BT = self._paired(canvas.positions(columns, state.pad_B))
        real_BS = self._paired(canvas.real_columns(state.pad_B, span.seen_B, columns=keys))
        kept = None if span.run_B is None else self._paired(columns >= span.run_B[:, None])
        start = self._paired(span.first)
        return self.model(tokens_BT, positions_BT, real_BS=real_BS, cache=cache, start=start, kept_BT=kept)

    def _look(
        self, carry: Carry, hidden: Float[Array, "rows T D"], span: Span, predicted: Slots, slots: Slots, *,
        active_B: Bool[Array, "B"],
    ) -> Carry:  # fmt: skip
        """`step` on the predicted columns of a forward's hidden states."""
        columns = hidden.shape[1]
        hidden = jnp.pad(hidden, ((0, 0), (0, predicted.width), (0, 0)))  # slots may stick out where nothing is open
        offset = predicted.first - self._shift - span.first
        hidden = canvas.take_columns(hidden, self._paired(offset), width=predicted.width)
        return self.step(carry, hidden, predicted=predicted, slots=slots, active_B=active_B, columns=columns)

    @property
    def _shift(self) -> int:
        """Columns left of a slot where its logits are made: 1 for models that predict the next token (Dream)."""
        return self.model.config.logit_shift

    def _paired(self, x: Array) -> Array:
        """Under guidance, every row of x twice: for its canvas and the promptless copy. A scalar holds for all rows."""
        return paired(x, x) if self.sampler.guided and jnp.ndim(x) else x

    def step(
        self,
        carry: Carry,
        hidden_BSD: Float[Array, "rows S D"],
        *,
        predicted: Slots,
        slots: Slots,
        active_B: Bool[Array, "B"],
        columns: int,
    ) -> Carry:
        """The common end of every iteration: predict, ask the policy and the stop rule, write the state.

        Args:
            carry: state before the step.
            hidden_BSD: hidden states of the S predicted columns (twice the rows under guidance).
            predicted: where the stop rule looks.
            slots: where the policy looks, Q of the predicted columns.
            active_B: rows this forward counts for; the others stay as they are.
            columns: canvas columns that the forward ran.
        """
        state, rows = carry
        prediction = self._predict(state, hidden_BSD, predicted)
        offset = slots.first - predicted.first
        seen = prediction
        if slots is not predicted:
            seen = jax.tree.map(lambda x: canvas.take_columns(x, offset, width=slots.width), prediction)
        view = self._view(state, slots)
        commit = self.policy.commit(rows, seen, view, self.noise)
        is_sane_BS = prediction.finite_BQ | (predicted.all() >= state.end_B[:, None])
        broken_B = ~is_sane_BS.all(axis=1)
        if commit.failed_B is not None:
            broken_B |= commit.failed_B
        broken_B &= active_B
        mask_BQ = commit.mask_BQ & view.open_BQ & (active_B & ~broken_B)[:, None]

        def written(old_BL: Array, new_BQ: Array) -> Array:
            old_BQ = canvas.take_columns(old_BL, slots.first, width=slots.width)
            return canvas.put_columns(old_BL, jnp.where(mask_BQ, new_BQ, old_BQ), slots.first)

        tokens_BL = written(state.tokens_BL, commit.token_BQ)
        end_B = state.end_B if commit.end_B is None else commit.end_B
        if self.stop is not None:
            accepted_BS = jnp.zeros(prediction.token_BQ.shape, bool)
            if commit.accepted_BQ is not None:
                accepted_BS = canvas.put_columns(accepted_BS, commit.accepted_BQ, offset)
            end_B = self.stop.end(
                end_B, prediction=prediction, open_BS=self._is_open(state, predicted, end_B), accepted_BS=accepted_BS,
                column_BS=predicted.all(),
            )  # fmt: skip
        end_B = jnp.where(active_B & ~broken_B, end_B, state.end_B)
        leave_B = active_B & (commit.leave_B | self._cut_short(state, tokens_BL, end_B))
        block_B = state.block_B + leave_B
        nfe_B = state.nfe_B + active_B
        goes_on_B = state.live_B & (self.geometry.block_start(block_B) < end_B)
        failed_B = broken_B | (goes_on_B & (nfe_B >= self.most_forwards))
        state = dataclasses.replace(
            state,
            tokens_BL=tokens_BL,
            commit_step_BL=written(state.commit_step_BL, state.nfe_B[:, None] + 1),
            confidence_BL=written(state.confidence_BL, seen.confidence_BQ),
            end_B=end_B,
            block_B=block_B,
            block_nfe_B=jnp.where(leave_B, 0, state.block_nfe_B + active_B),
            nfe_B=nfe_B,
            live_B=goes_on_B & ~failed_B,
            failed_B=state.failed_B | failed_B,
            iterations=state.iterations + 1,
            columns=state.columns + columns,
        )
        return Carry(state, freeze(commit.rows, rows, active_B))

    def _predict(self, state: DecodeState, hidden_BSD: Float[Array, "rows S D"], slots: Slots) -> Prediction:
        """What the model says about the slots; about several blocks without logits, of which few are there at once."""

        def of(hidden: Float[Array, "rows Q D"], part: Slots) -> Prediction:
            return predict_slots(self.model.unembed(hidden), self.sampler, noise=self._gumbel(state, part))

        width = self.geometry.block_length
        if slots.width <= width:
            return of(hidden_BSD, slots)

        def of_block(offset: Int[Array, ""]) -> Prediction:
            hidden = jax.lax.dynamic_slice_in_dim(hidden_BSD, offset, width, axis=1)
            prediction = of(hidden, Slots(slots.first + offset, width))
            return dataclasses.replace(prediction, logits_BQV=prediction.logits_BQV[..., :0], gumbel_BQV=None)

        blocks = jax.lax.map(of_block, jnp.arange(0, slots.width, width))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], slots.width, *x.shape[3:]), blocks)

    def _view(self, state: DecodeState, slots: Slots) -> View:
        """What the policy sees before a step."""
        first_B = jnp.full_like(state.end_B, self.geometry.prompt_length)
        is_filled_BL = (state.tokens_BL != self.mask_id) & self._between(first_B, state.end_B)
        return View(
            start_B=jnp.broadcast_to(slots.first, state.end_B.shape),
            pad_B=state.pad_B,
            end_B=state.end_B,
            filled_B=jnp.sum(is_filled_BL, axis=1),
            position_BQ=self._positions(state, slots),
            open_BQ=self._is_open(state, slots, self._block_end(state, state.end_B)),
            row_B=state.row_B,
            nfe_B=state.nfe_B,
            block_nfe_B=state.block_nfe_B,
        )

    def _positions(self, state: DecodeState, slots: Slots) -> Int[Array, "B Q"]:
        """Generated position of every slot, from 0."""
        return jnp.broadcast_to(slots.all() - self.geometry.prompt_length, (len(state.end_B), slots.width))

    def _is_open(self, state: DecodeState, slots: Slots, end_B: Int[Array, "B"]) -> Bool[Array, "B Q"]:
        """The slots that are masked and before `end`."""
        tokens_BQ = canvas.take_columns(state.tokens_BL, slots.first, width=slots.width)
        return (tokens_BQ == self.mask_id) & (slots.all() < end_B[:, None])

    def _between(self, first_B: Int[Array, "B"], end_B: Int[Array, "B"]) -> Bool[Array, "B L"]:
        """True for the columns [first, end) of every row."""
        columns_1L = jnp.arange(self.geometry.columns)[None, :]
        return (columns_1L >= first_B[:, None]) & (columns_1L < end_B[:, None])

    def _block_end(self, state: DecodeState, end_B: Int[Array, "B"]) -> Int[Array, "B"]:
        """One past the last column of every row's block, if the rows end there."""
        return jnp.minimum(self.geometry.block_start(state.block_B + 1), end_B)

    def _cut_short(self, state: DecodeState, tokens_BL: Int[Array, "B L"], end_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Rows whose block is full where its policy could not know: it ends earlier now, or earlier ones are not full.

        And those whose block has used up its forwards.
        """
        block_end_B = self._block_end(state, end_B)
        in_block_BL = self._between(self.geometry.block_start(state.block_B), block_end_B)
        full_B = ~((tokens_BL == self.mask_id) & in_block_BL).any(axis=1)
        if self.block_limit is not None:
            return full_B | (state.block_nfe_B + 1 >= self.block_limit)
        return full_B & (block_end_B < self._block_end(state, state.end_B))

    def _gumbel(self, state: DecodeState, slots: Slots) -> Float[Array, "B Q V"] | None:
        if not self.sampler.stochastic:
            return None
        position_BQ = self._positions(state, slots)
        vocab_size = self.model.config.vocab_size
        return self.noise.gumbel(state.row_B, state.nfe_B, position_BQ, vocab_size=vocab_size)


@jax.jit
def decode(engine: Engine, state: DecodeState) -> DecodeState:
    """Runs a batch to its end: the whole generation as one compiled program."""

    def run_on(canvas: Geometry) -> Callable[[Carry], Carry]:
        return lambda carry: _run_block(engine, carry, canvas)

    def trip(carry: Carry) -> Carry:
        end = jnp.max(jnp.where(carry.state.live_B, carry.state.end_B, 0))
        shortest = jnp.sum(jnp.array([canvas.length for canvas in engine.canvases]) >= end) - 1
        return jax.lax.switch(shortest, [run_on(canvas) for canvas in engine.canvases], carry)

    def more(carry: Carry) -> Bool[Array, ""]:
        return engine.unfinished(carry.state, carry.state.live_B)

    state, rows = jax.lax.while_loop(more, trip, engine.start(state))
    return dataclasses.replace(state, log=reported(rows))


def _run_block(engine: Engine, carry: Carry, canvas: Geometry) -> Carry:
    """A trip of the outer loop: a full forward, then cached steps until every live row has left the block."""
    block = caching.current_block(carry.state)
    carry, cache = engine.full_step(carry, length=canvas.length)
    widths = sorted(set(engine.cache.widths(canvas)))
    if not widths:
        return carry
    cache = widened(cache, columns=canvas.columns)

    def in_the_block(state: DecodeState) -> Bool[Array, ""]:
        return engine.unfinished(state, in_block(state, block))

    def cached_steps(place: int) -> Callable[[Carry, Cache], Carry]:
        """Steps of one width, while it is the narrowest that will do."""

        def more(loop: tuple[Carry, Cache]) -> Bool[Array, ""]:
            state = loop[0].state
            return in_the_block(state) & (engine.narrowest(state, block, widths) == place)

        def body(loop: tuple[Carry, Cache]) -> tuple[Carry, Cache]:
            return engine.cached_step(*loop, width=widths[place])

        return lambda *loop: jax.lax.while_loop(more, body, loop)[0]

    def narrowing(carry: Carry) -> Carry:
        # Steps run, and write, all that they see behind the block's start: at every width they begin with `cache`.
        place = engine.narrowest(carry.state, block, widths)
        return jax.lax.switch(place, [cached_steps(place) for place in range(len(widths))], carry, cache)

    if len(widths) == 1:
        return cached_steps(0)(carry, cache)
    return jax.lax.while_loop(lambda carry: in_the_block(carry.state), narrowing, carry)


def in_block(state: DecodeState, block: Int[Array, ""]) -> Bool[Array, "B"]:
    """The live rows that decode this block."""
    return state.live_B & (state.block_B == block)


def reported(rows: Any) -> PolicyLog | None:
    """The log in a policy's state, if it keeps one."""
    parts = jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Reported))
    return next((part.value for part in parts if isinstance(part, Reported)), None)


def freeze(new: Any, old: Any, active_B: Bool[Array, "B"]) -> Any:
    """A policy's state, new for the active rows and old for the others; what is `InPlace` is new for all."""

    def choose(n: Any, o: Any) -> Any:
        if isinstance(n, InPlace):
            return n
        return jnp.where(jnp.expand_dims(active_B, tuple(range(1, n.ndim))), n, o)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, InPlace))
