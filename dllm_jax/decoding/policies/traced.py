"""What happened in every forward of a row, for people to look at: a policy around any policy, with `output.trace`.

It changes nothing of the decode. The final tokens with their forwards are in every result; what else a forward knew is
kept here: its open range, the end of the row, what was proposed for every open position, what is masked again later.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.config import Config
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Parts, Policy, PolicyLog, Reported, Sizes, View, Wants
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.settings import block_schedule

DIGITS = 4  # of the numbers told


@struct.dataclass
class Step:
    """A forward of every row, before its commit; Q slots. Positions count from the start of the generation."""

    slot_B: Int[Array, "..."]  # of the first slot
    first_B: Int[Array, "..."]  # of the open range
    behind_B: Int[Array, "..."]  # one past its last position
    end_B: Int[Array, "..."]  # one past the row's last position
    open_BQ: Bool[Array, "... Q"]
    token_BQ: Int[Array, "... Q"]  # what stood there
    draft_BQ: Int[Array, "... Q"]  # what was proposed
    confidence_BQ: Float[Array, "... Q"]  # in what was proposed
    noted: dict[str, Float[Array, "... Q"]]  # by the policy, see `Policy.noted`


@struct.dataclass
class Trace:
    """All forwards of every row, [B, F, ...], and what the policy itself reports."""

    forwards_B: Int[Array, "B"]  # so far
    steps: Step
    theirs: PolicyLog | None
    mask_id: int = struct.field(pytree_node=False)
    gen_length: int = struct.field(pytree_node=False)  # tokens asked for: behind them nothing is told

    def row(self, i: int) -> dict[str, Any]:
        """Fields of an output line for row `i` of a batch, on the host.

        Returns:
            `steps`: for every forward its `block` [first, one past the last], the row's `end`, the `open` positions,
            the tokens (`draft`) and confidences proposed for them and what the policy noted of them; and `retracted`,
            where the forward masked tokens again or wrote over them: [position, token, forward in which it was
            committed]. A forward that only closes a block has an empty one, and nothing open. `held`: the same of all
            tokens that a later forward found, which need not be in the result: a row may end before them.
        """
        count = min(int(self.forwards_B[i]), self.steps.slot_B.shape[1])
        steps = [jax.tree.map(lambda x, f=f: np.asarray(x[i, f]), self.steps) for f in range(count)]
        told = [_told(step, gen_length=self.gen_length) for step in steps]
        retracted, held = _history(steps, mask_id=self.mask_id, gen_length=self.gen_length)
        for forward, *what in retracted:
            told[forward - 1].setdefault("retracted", []).append(what)
        return {"steps": told, "held": held} | (self.theirs.row(i) if self.theirs else {})


class TracedState(NamedTuple):
    """The log, and the state of the policy inside without the log it keeps."""

    log: Reported
    inner: Any


@struct.dataclass
class Traced(Policy):
    """The policy inside, and a record of all that it sees.

    Attributes:
        policy: what decides.
        least_forwards: room for so many forwards, if that is more than the policy can need.
        closings: whether there are forwards that only close a block.
        mask_id: of the model.
        gen_length: tokens asked for.
    """

    policy: Policy
    least_forwards: int = struct.field(pytree_node=False)
    closings: bool = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)
    gen_length: int = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        """What the policy does."""
        return self.policy.wants

    def most_forwards(self, geometry: Geometry) -> int:
        """The policy's own."""
        return self.policy.most_forwards(geometry)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> TracedState:
        """An empty record."""
        rows, forwards = len(state.nfe_B), max(self.most_forwards(geometry), self.least_forwards)
        forwards += self.closings * (geometry.num_blocks + 1)

        def zeros(dtype: Any, *shape: int) -> Array:
            return jnp.zeros((rows, forwards, *shape), dtype)

        number, per_slot = zeros(jnp.int32), zeros(jnp.int32, sizes.slots)
        share = zeros(jnp.float32, sizes.slots)
        steps = Step(
            slot_B=number,
            first_B=number,
            behind_B=number,
            end_B=number,
            open_BQ=zeros(bool, sizes.slots),
            token_BQ=per_slot,
            draft_BQ=per_slot,
            confidence_BQ=share,
            noted=dict.fromkeys(self.policy.noted, share),
        )
        inner, theirs = _without_log(self.policy.init(state, geometry, sizes))
        trace = Trace(jnp.zeros_like(state.nfe_B), steps, theirs, self.mask_id, self.gen_length)
        return TracedState(_kept(trace), inner)

    def commit(self, policy_state: TracedState, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The policy's, with its forward in the record."""
        trace: Trace = policy_state.log.value
        commit = self.policy.commit(_with_log(policy_state.inner, trace.theirs), prediction, view, noise)
        inner, theirs = _without_log(commit.policy_state)
        theirs = jax.tree.map(lambda old, new: _where(view.closing_B, old, new), trace.theirs, theirs)
        slot_B = view.position_BQ[:, 0]
        offset_B = slot_B - view.start_B  # from a column to a position
        width = view.block_BQ.shape[1]
        first_B = slot_B + jnp.argmax(view.block_BQ, axis=1)
        last_B = slot_B + width - 1 - jnp.argmax(view.block_BQ[:, ::-1], axis=1)
        step = Step(
            slot_B=slot_B,
            first_B=first_B,
            behind_B=jnp.where(view.block_BQ.any(axis=1), last_B + 1, first_B),
            end_B=view.end_B + offset_B,
            open_BQ=view.open_BQ,
            token_BQ=view.token_BQ,
            draft_BQ=prediction.token_BQ,
            confidence_BQ=prediction.confidence_BQ,
            noted=dict(zip(self.policy.noted, commit.noted, strict=True)),
        )

        def added(all_F: Array, new: Array, forward: Int[Array, ""]) -> Array:
            return all_F.at[forward].set(new.astype(all_F.dtype), mode="drop")

        steps = jax.tree.map(lambda all_BF, new_B: jax.vmap(added)(all_BF, new_B, trace.forwards_B), trace.steps, step)
        trace = dataclasses.replace(trace, forwards_B=trace.forwards_B + 1, steps=steps, theirs=theirs)
        return commit._replace(policy_state=TracedState(_kept(trace), inner))


def around(policy: Policy, config: Config, parts: Parts) -> Traced:
    """The policy with a record of its forwards."""
    # The released dual-cache loop may go on for all scheduled forwards.
    scheduled = block_schedule(config.decode)[1] if config.decode.compat == "reference" else 0
    return Traced(
        policy,
        least_forwards=scheduled,
        closings=parts.block_causal,
        mask_id=parts.mask_id,
        gen_length=config.decode.gen_length,
    )


def _kept(trace: Trace) -> Reported:
    """The record, which has all forwards, those that only close a block as well."""
    return Reported(trace, always=True)


def _where(rows_B: Bool[Array, "B"], x: Array, y: Array) -> Array:
    return jnp.where(jnp.expand_dims(rows_B, tuple(range(1, x.ndim))), x, y)


def _is_log(part: Any) -> bool:
    return isinstance(part, Reported)


def _without_log(policy_state: Any) -> tuple[Any, PolicyLog | None]:
    """A policy's state with nothing in the place of its log, and the log."""
    logs = [part.value for part in jax.tree.leaves(policy_state, is_leaf=_is_log) if _is_log(part)]
    emptied = jax.tree.map(lambda part: Reported(None) if _is_log(part) else part, policy_state, is_leaf=_is_log)
    return emptied, logs[0] if logs else None


def _with_log(policy_state: Any, log: PolicyLog | None) -> Any:
    return jax.tree.map(lambda part: Reported(log) if _is_log(part) else part, policy_state, is_leaf=_is_log)


def _told(step: Step, *, gen_length: int) -> dict[str, Any]:
    """A forward of one row, for an output line."""
    (open_slots,) = np.nonzero(step.open_BQ & (np.arange(len(step.open_BQ)) + step.slot_B < gen_length))
    numbers = {"confidence": step.confidence_BQ} | step.noted
    return {
        "block": [min(int(step.first_B), gen_length), min(int(step.behind_B), gen_length)],
        "end": min(int(step.end_B), gen_length),
        "open": (open_slots + step.slot_B).tolist(),
        "draft": step.draft_BQ[open_slots].tolist(),
        **{name: [_rounded(x) for x in x_Q[open_slots].tolist()] for name, x_Q in numbers.items()},
    }


def _rounded(x: float) -> float | None:
    return round(x, DIGITS) if math.isfinite(x) else None


def _history(steps: list[Step], *, mask_id: int, gen_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """What was masked again, or written over, after which forward, and what was not.

    The first are [forward, position, token, forward of its commit].

    Forwards count from 1.
    """
    retracted: list[list[int]] = []
    held: dict[int, list[int]] = {}  # position -> position, token, forward of its commit
    for forward, step in enumerate(steps):
        for position, token in enumerate(step.token_BQ.tolist(), start=int(step.slot_B)):
            if not step.first_B <= position < step.behind_B or position >= gen_length:
                continue
            if position in held and token != held[position][1]:
                retracted.append([forward, *held.pop(position)])
            if token != mask_id:
                held.setdefault(position, [position, token, forward])
    return retracted, list(held.values())
