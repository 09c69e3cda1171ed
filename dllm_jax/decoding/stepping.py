"""One iteration: a forward, and what follows from it. `step` is the only writer of the state.

Nothing here knows a policy, a cache, an axis of blocks or a stop rule, only their contracts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding import canvas
from dllm_jax.decoding.blocks import Counted
from dllm_jax.decoding.closing import crossed
from dllm_jax.decoding.engine import Carry, Engine, Forward, Slots
from dllm_jax.decoding.policies.base import Commit, InPlace, PerSlot, Reported, View
from dllm_jax.decoding.prediction import Prediction, proposable
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stopping import Look
from dllm_jax.models.cache import Cache, columns_of


@jax.named_scope("full_step")  # the names stand in the compiled program: `dllm_jax.hlo` finds the loops by them
def full_step(engine: Engine, carry: Carry, *, length: int) -> tuple[Carry, Cache]:
    """One iteration with a forward of the canvas, of the rows whose cache is stale; logits only for the slots.

    Args:
        engine: the decode's parts.
        carry: state before the step; no live row ends behind `length`.
        length: columns that run, static.

    Returns:
        The state after the step, and the keys and values of those columns.
    """
    before = carry.state
    active_B = before.live_B & engine.cache.stale(before)
    state = dataclasses.replace(
        before,
        cached_end_B=jnp.where(active_B, before.end_B, before.cached_end_B),
        cached_nfe_B=jnp.where(active_B, before.nfe_B, before.cached_nfe_B),
    )
    slots = engine.slots(state)
    span = engine.cache.span(state, slots.first)._replace(first=jnp.int32(0), run_B=None)
    if engine.block_limit is not None:  # blocks that ran out of forwards may have left masks, which compete again
        slots = engine.whole(length)
    if engine.policy.wants.attention or engine.policy.wants.shadow:
        forward, cache = engine.look_closer(state, slots, length=length)
    else:
        forward, cache = engine.run(state, span, width=length, keys=length)
    return step(engine, carry._replace(state=state), forward, slots=slots, active_B=active_B), cache


@jax.named_scope("cached_step")
def cached_step(engine: Engine, carry: Carry, cache: Cache, *, width: int) -> tuple[Carry, Cache]:
    """One iteration of the rows whose cache is fresh, with a forward of a slice of `width` columns.

    Returns:
        The state after the step, and the cache with the slice's own keys and values.
    """
    state = carry.state
    active_B, slots = engine.served(state), engine.slots(state)
    span = engine.cache.span(state, slots.first)
    forward, cache = engine.run(state, span, width=width, keys=columns_of(cache), cache=cache)
    return step(engine, carry, forward, slots=slots, active_B=active_B), cache


class Predicted(NamedTuple):
    """What the model says about columns that somebody looks at."""

    slots: Slots
    prediction: Prediction


def step(engine: Engine, carry: Carry, forward: Forward, *, slots: Slots, active_B: Bool[Array, "B"]) -> Carry:
    """The common end of every iteration: predict, ask the policy and the stop rule, write the state.

    Args:
        engine: the decode's parts.
        carry: state before the step.
        forward: of the model.
        slots: where the policy looks, Q columns. The stop rule looks there too, or at all of the generation.
        active_B: rows this forward counts for; the others stay as they are.
    """
    before, policy_state = carry
    for_policy, for_stop = _predicted(engine, before, forward, slots)
    prediction = for_policy.prediction
    settled_B = engine.blocks.settle(before, prediction, slots.all(), engine.geometry)
    state = dataclasses.replace(before, block_end_B=jnp.where(active_B, settled_B, before.block_end_B))
    view = _view(engine, state, forward, slots)
    commit = engine.policy.commit(policy_state, prediction, view, engine.noise)

    is_sane_BS = for_stop.prediction.finite_BQ | (for_stop.slots.all() >= state.end_B[:, None])
    broken_B = ~is_sane_BS.all(axis=1)
    if commit.failed_B is not None:
        broken_B |= commit.failed_B
    broken_B &= active_B
    decides_B = active_B & ~before.closing_B
    counts_B = decides_B & ~broken_B
    state = _committed(engine, state, commit, for_policy, view, counts_B=counts_B)
    if engine.model.config.logit_shift and engine.blocks.closes:
        state = _began(engine, state, for_policy, counts_B=active_B & before.closing_B & ~broken_B)
    state, filled_B = _stopped(engine, before, state, commit, for_stop, slots=slots, counts_B=counts_B)
    leave_B = decides_B & (commit.leave_B | _cut_short(engine, state, before) | filled_B)
    if not engine.looks_everywhere:
        filled_B = jnp.zeros_like(filled_B)  # it was the block that was filled
    state = _advanced(engine, state, active_B=active_B, leave_B=leave_B, done_B=filled_B, broken_B=broken_B)
    state = dataclasses.replace(state, columns=state.columns + forward.columns)
    policy_state = freeze(commit.policy_state, policy_state, decides_B, active_B=active_B)
    return Carry(state, _followed(engine, policy_state, before, state, leave_B=leave_B))


def _predicted(engine: Engine, state: DecodeState, forward: Forward, slots: Slots) -> tuple[Predicted, Predicted]:
    """What the policy gets to know, and the stop rule: the same, unless the rule looks everywhere."""
    wants_logits = engine.policy.wants.logits
    if not engine.looks_everywhere:
        both = Predicted(slots, engine.predict(state, forward, slots, logits=wants_logits))
        return both, both
    everywhere = engine.whole(forward.hidden.shape[1])
    all_of_it = engine.predict(state, forward, everywhere)
    if wants_logits and not all_of_it.logits_BQV.shape[-1]:
        own = engine.predict(state, forward, slots, logits=True)
    else:
        own = jax.tree.map(lambda x: _cut(engine, x, slots, first=everywhere.first), all_of_it)
    return Predicted(slots, own), Predicted(everywhere, all_of_it)


def _cut(engine: Engine, x: Array, slots: Slots, *, first: Int[Array, ""]) -> Array:
    """The policy's slots of an array that begins at a column; they may stick out."""
    if not engine.blocks.on_grid:
        x = jnp.pad(x, ((0, 0), (0, slots.width)) + ((0, 0),) * (x.ndim - 2))
    return canvas.take_columns(x, slots.first - first, width=slots.width)


def _view(engine: Engine, state: DecodeState, forward: Forward, slots: Slots) -> View:
    """What the policy sees before a step."""
    geometry, columns_BQ = engine.geometry, slots.all()
    token_BQ = canvas.take_columns(state.tokens_BL, slots.first, width=slots.width)
    is_before_end_BQ = columns_BQ < jnp.minimum(state.block_end_B, state.end_B)[:, None]
    if engine.blocks.closes:
        is_before_end_BQ &= ~state.closing_B[:, None]
    first_B = jnp.full_like(state.end_B, geometry.prompt_length)
    is_text_BL = canvas.between(first_B, state.end_B, columns=geometry.columns)
    view = View(
        start_B=jnp.broadcast_to(slots.first, state.end_B.shape),
        position_BQ=jnp.broadcast_to(columns_BQ - geometry.prompt_length, token_BQ.shape),
        open_BQ=(token_BQ == engine.mask_id) & is_before_end_BQ,
        block_BQ=(columns_BQ >= state.block_start_B[:, None]) & is_before_end_BQ,
        token_BQ=token_BQ,
        pad_B=state.pad_B,
        end_B=state.end_B,
        filled_B=jnp.sum((state.tokens_BL != engine.mask_id) & is_text_BL, axis=1),
        row_B=state.row_B,
        nfe_B=state.decided,
        block_nfe_B=state.block_nfe_B,
        closing_B=state.closing_B,
        looks=forward.looks,
    )
    if forward.shadow is not None:
        view = dataclasses.replace(view, shadow_BQ=engine.shadow(state, forward.shadow, slots, token_BQ))
    if engine.policy.wants.canvas:
        known_BL, confidence_BL = engine.whole_canvas(state, forward)
        view = dataclasses.replace(view, known_BL=known_BL, confidence_BL=confidence_BL)
    return view


def _committed(
    engine: Engine,
    state: DecodeState,
    commit: Commit,
    predicted: Predicted,
    view: View,
    *,
    counts_B: Bool[Array, "B"],
) -> DecodeState:
    """The state with the policy's tokens and what the blocks add to them, and without those it takes back."""
    slots, confidence_BQ = predicted.slots, predicted.prediction.confidence_BQ
    score_BQ = confidence_BQ if commit.score_BQ is None else commit.score_BQ
    mask_BQ = engine.blocks.complete(commit.mask_BQ & view.open_BQ, score_BQ, view.open_BQ, engine.geometry)
    commit_step_B1 = state.nfe_B[:, None] + 1
    state = write(state, slots, mask_BQ & counts_B[:, None], (commit.token_BQ, commit_step_B1, confidence_BQ))
    if commit.retract_BQ is not None:
        retract_BQ = commit.retract_BQ & view.block_BQ & ~view.open_BQ & counts_B[:, None]
        state = write(state, slots, retract_BQ, (engine.mask_id, 0, 0.0))
    if commit.edit_BQ is not None:
        edit_BQ = commit.edit_BQ & view.block_BQ & ~view.open_BQ & counts_B[:, None]
        state = write(state, slots, edit_BQ, (commit.token_BQ, commit_step_B1, score_BQ))
    if commit.end_B is None:
        return state
    return dataclasses.replace(state, end_B=jnp.where(counts_B, commit.end_B, state.end_B))


def _began(engine: Engine, state: DecodeState, predicted: Predicted, *, counts_B: Bool[Array, "B"]) -> DecodeState:
    """The state with the first token of the next block, where the last position of the one before predicts it.

    It is the likeliest at any temperature, as released.
    """
    assert isinstance(engine.blocks, Counted)
    slots, prediction = predicted
    logits_B1V = proposable(prediction.logits_BQV[:, :1], engine.sampler.mask_id)
    is_begun_B = counts_B & engine.blocks.is_first(state.block_start_B, state.pad_B)
    is_masked_B = state.block_start_B < state.end_B  # else the row ends with the block that was closed
    mask_BQ = (jnp.arange(slots.width)[None, :] == 0) & (is_begun_B & is_masked_B)[:, None]
    new = (jnp.argmax(logits_B1V, axis=-1), state.nfe_B[:, None] + 1, prediction.confidence_BQ)
    return write(state, slots, mask_BQ, new)


def _stopped(
    engine: Engine,
    before: DecodeState,
    state: DecodeState,
    commit: Commit,
    predicted: Predicted,
    *,
    slots: Slots,
    counts_B: Bool[Array, "B"],
) -> tuple[DecodeState, Bool[Array, "B"]]:
    """The state after the stop rule, and the rows whose masks it committed, as far as it looked.

    Args:
        engine: the decode's parts.
        before: the state before the step.
        state: with the policy's commits.
        commit: the policy's answer.
        predicted: where the rule looks.
        slots: where the policy does.
        counts_B: rows that may change.
    """
    if engine.stop is None:
        return state, jnp.zeros_like(counts_B)
    looked_at, prediction = predicted

    def open_of(state: DecodeState, end_B: Int[Array, "B"]) -> Bool[Array, "B S"]:
        token_BS = canvas.take_columns(state.tokens_BL, looked_at.first, width=looked_at.width)
        return (token_BS == engine.mask_id) & (looked_at.all() < end_B[:, None])

    accepted_BS = jnp.zeros(prediction.token_BQ.shape, bool)
    if commit.accepted_BQ is not None:
        accepted_BS = canvas.put_columns(accepted_BS, commit.accepted_BQ, slots.first - looked_at.first)
    length_B = before.end_B - engine.geometry.prompt_length
    decoded_B = 1 - engine.masked(before).sum(axis=1) / length_B
    look = Look(prediction, looked_at.all(), open_of(before, state.end_B), accepted_BS, decoded_B)
    ending = engine.stop.apply(state.end_B, look)
    state = dataclasses.replace(state, end_B=jnp.where(counts_B, ending.end_B, state.end_B))
    if ending.fill_B is None:
        return state, jnp.zeros_like(counts_B)
    fill_B = ending.fill_B & counts_B
    mask_BS = open_of(state, state.end_B) & fill_B[:, None]
    new = (prediction.token_BQ, state.nfe_B[:, None] + 1, prediction.confidence_BQ)
    return write(state, looked_at, mask_BS, new), fill_B


def write(
    state: DecodeState,
    slots: Slots,
    mask_BQ: Bool[Array, "B Q"],
    new: tuple[Array | float, Array | float, Array | float],
) -> DecodeState:
    """The state with new tokens, commit steps and confidences in some of the slots; they broadcast to [B, Q]."""

    def written(old_BL: Array, new_BQ: Array | float) -> Array:
        old_BQ = canvas.take_columns(old_BL, slots.first, width=slots.width)
        new_BQ = jnp.broadcast_to(jnp.asarray(new_BQ, old_BQ.dtype), old_BQ.shape)
        return canvas.put_columns(old_BL, jnp.where(mask_BQ, new_BQ, old_BQ), slots.first)

    token, commit_step, confidence = new
    return dataclasses.replace(
        state,
        tokens_BL=written(state.tokens_BL, token),
        commit_step_BL=written(state.commit_step_BL, commit_step),
        confidence_BL=written(state.confidence_BL, confidence),
    )


def _cut_short(engine: Engine, state: DecodeState, before: DecodeState) -> Bool[Array, "B"]:
    """Rows whose block is full where its policy could not know: it ends earlier now, or earlier ones are not full.

    And those whose block has used up its forwards.
    """
    end_B = jnp.minimum(state.block_end_B, state.end_B)
    in_block_BL = canvas.between(state.block_start_B, end_B, columns=engine.geometry.columns)
    full_B = ~((state.tokens_BL == engine.mask_id) & in_block_BL).any(axis=1)
    if engine.block_limit is not None:
        return full_B | (state.block_nfe_B + 1 >= engine.block_limit)
    return full_B & (end_B < jnp.minimum(state.block_end_B, before.end_B))


def _advanced(
    engine: Engine,
    state: DecodeState,
    *,
    active_B: Bool[Array, "B"],
    leave_B: Bool[Array, "B"],
    done_B: Bool[Array, "B"],
    broken_B: Bool[Array, "B"],
) -> DecodeState:
    """The state with its open ranges moved and its forwards counted; rows at their end are live no more."""
    masked_BL = engine.masked(state)
    start_B, end_B = engine.blocks.advance(state, masked_BL, engine.geometry, leave_B=leave_B)
    start_B = jnp.where(active_B, start_B, state.block_start_B)
    nfe_B = state.nfe_B + active_B
    closing_B, last_B = crossed(engine, state, start_B=start_B, active_B=active_B, leave_B=leave_B)
    ended_B = last_B < state.end_B
    moved_B = leave_B | (active_B & state.closing_B)
    has_more_B = engine.blocks.has_more(state, masked_BL, engine.geometry, start_B=start_B, moved_B=moved_B)
    goes_on_B = state.live_B & (has_more_B | closing_B) & ~done_B & ~ended_B
    failed_B = broken_B | (goes_on_B & (nfe_B >= engine.most_forwards))
    enters_B = leave_B if engine.blocks.in_turn else jnp.zeros_like(leave_B)
    return dataclasses.replace(
        state,
        block_start_B=start_B,
        block_end_B=jnp.where(active_B, end_B, state.block_end_B),
        block_nfe_B=jnp.where(enters_B, 0, state.block_nfe_B + (active_B & ~state.closing_B)),
        closing_B=closing_B,
        nfe_B=nfe_B,
        closed_B=state.closed_B + (active_B & state.closing_B),
        end_B=last_B,
        live_B=goes_on_B & ~failed_B,
        failed_B=state.failed_B | failed_B,
        iterations=state.iterations + 1,
    )


def freeze(new: Any, old: Any, decides_B: Bool[Array, "B"], *, active_B: Bool[Array, "B"]) -> Any:
    """A policy's state, new for the rows for which it decided and old for the others.

    What is `InPlace` is new for all, what is `Reported` always for all rows that the forward counted for.
    """

    def choose(n: Any, o: Any, rows_B: Array = decides_B) -> Any:
        if isinstance(n, InPlace):
            return n
        if isinstance(n, Reported):
            return jax.tree.map(lambda new, old: choose(new, old, active_B), n, o)
        return jnp.where(per_row(rows_B, n), n, o)

    def is_leaf(part: Any) -> bool:
        return isinstance(part, InPlace) or (isinstance(part, Reported) and part.always)

    return jax.tree.map(choose, new, old, is_leaf=is_leaf)


def _followed(
    engine: Engine, policy_state: Any, before: DecodeState, state: DecodeState, *, leave_B: Bool[Array, "B"]
) -> Any:
    """A policy's state whose `PerSlot` parts stand where the slots of the next forward do."""

    def follow(part: Any) -> Any:
        return jax.tree.map(moved, part) if isinstance(part, PerSlot) else part

    def moved(x: Array) -> Array:
        if engine.blocks.in_turn:
            return jnp.where(per_row(leave_B, x), jnp.zeros_like(x), x)
        if not engine.blocks.moves_slots:
            return x
        shift_B = state.block_start_B - before.block_start_B
        padded = jnp.pad(x, ((0, 0), (0, x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        return canvas.take_columns(padded, jnp.minimum(shift_B, x.shape[1]), width=x.shape[1])

    return jax.tree.map(follow, policy_state, is_leaf=lambda x: isinstance(x, PerSlot | InPlace))


def per_row(x_B: Array, like: Array) -> Array:
    """An array of one number per row with as many axes as another."""
    return jnp.expand_dims(x_B, tuple(range(1, like.ndim)))
