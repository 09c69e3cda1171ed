"""The one decoding loop. Decoders differ in what is plugged into it, never in a loop of their own.

An iteration is one forward of the diffusion model: the cache strategy says which columns run, `prediction` turns hidden
states into tokens and confidences, the policy says which are committed, and `step` (the only writer of the state) writes
them and advances rows. The outer loop's forward sees the whole canvas; with a cache its keys and values then serve an inner
loop of cheaper forwards until the cache is stale.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding import canvas
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import CommitPolicy, View
from dllm_jax.decoding.prediction import Sampler, predict_slots
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from dllm_jax.models.transformer import Transformer


class Carry(NamedTuple):
    """What the loop carries: the driver's state and the policy's."""

    state: DecodeState
    rows: Any


@dataclasses.dataclass(frozen=True)
class Engine:
    """A decode's parts, built inside jit around the merged model."""

    model: Transformer
    policy: CommitPolicy
    sampler: Sampler
    noise: Noise
    geometry: Geometry
    mask_id: int

    def start(self, state: DecodeState) -> Carry:
        """The carry before the first forward."""
        return Carry(state, self.policy.init(state, self.geometry))

    def full_step(self, carry: Carry) -> Carry:
        """One iteration with a forward of the whole canvas; logits only for the open block of every row."""
        state, geometry = carry.state, self.geometry
        start_B = geometry.block_start(state.block_B)
        tokens_BL = self._guided_pair(state.tokens_BL[:, : geometry.length])
        copies = tokens_BL.shape[0] // state.tokens_BL.shape[0]
        positions_BL = canvas.positions(jnp.arange(geometry.length), state.pad_B)
        mask = canvas.key_mask(state.pad_B, state.end_B, columns=geometry.length)
        hidden_BLD, _ = self.model(
            tokens_BL, jnp.tile(positions_BL, (copies, 1)), mask=jnp.tile(mask, (copies, 1, 1, 1))
        )
        hidden_BQD = take_columns(hidden_BLD, jnp.tile(start_B, copies), width=geometry.block_length)
        return self.step(carry, hidden_BQD, start_B, state.live_B)

    def step(
        self, carry: Carry, hidden_BQD: Float[Array, "rows Q D"], start_B: Int[Array, "B"], active_B: Bool[Array, "B"]
    ) -> Carry:
        """The common end of every iteration: predict the slots, ask the policy, write the state.

        Args:
            carry: state before the step.
            hidden_BQD: hidden states of the Q slots (twice the rows under guidance).
            start_B: column of the first slot of every row.
            active_B: rows this forward counts for; the others stay as they are.
        """
        state, rows = carry
        slots = hidden_BQD.shape[1]
        tokens_BQ = take_columns(state.tokens_BL, start_B, width=slots)
        columns_BQ = start_B[:, None] + jnp.arange(slots)[None, :]
        view = View(
            position_BQ=columns_BQ - self.geometry.prompt_length,
            open_BQ=(tokens_BQ == self.mask_id) & (columns_BQ < state.end_B[:, None]),
            row_B=state.row_B,
            nfe_B=state.nfe_B,
            block_nfe_B=state.block_nfe_B,
        )
        prediction = predict_slots(self.model.unembed(hidden_BQD), self.sampler, noise=self._gumbel(view))
        commit = self.policy.commit(rows, prediction, view, self.noise)
        mask_BQ = commit.mask_BQ & view.open_BQ & active_B[:, None]
        step_BQ = take_columns(state.commit_step_BL, start_B, width=slots)
        leave_B = commit.leave_B & active_B
        block_B = state.block_B + leave_B
        state = state.replace(
            tokens_BL=put_columns(state.tokens_BL, jnp.where(mask_BQ, commit.token_BQ, tokens_BQ), start_B),
            commit_step_BL=put_columns(
                state.commit_step_BL, jnp.where(mask_BQ, state.nfe_B[:, None] + 1, step_BQ), start_B
            ),
            block_B=block_B,
            block_nfe_B=jnp.where(leave_B, 0, state.block_nfe_B + active_B),
            nfe_B=state.nfe_B + active_B,
            live_B=state.live_B & (self.geometry.block_start(block_B) < state.end_B),
            iterations=state.iterations + 1,
        )
        return Carry(state, freeze(commit.rows, rows, active_B))

    def _guided_pair(self, tokens_BL: Int[Array, "B L"]) -> Int[Array, "rows L"]:
        """Under guidance, the canvases and behind them the same with the prompt masked."""
        if not self.sampler.guided:
            return tokens_BL
        is_prompt_1L = jnp.arange(tokens_BL.shape[1])[None, :] < self.geometry.prompt_length
        return jnp.concatenate([tokens_BL, jnp.where(is_prompt_1L, self.mask_id, tokens_BL)])

    def _gumbel(self, view: View) -> Float[Array, "B Q V"] | None:
        if not self.sampler.stochastic:
            return None
        vocab_size = self.model.config.vocab_size
        return self.noise.gumbel(view.row_B, view.nfe_B, view.position_BQ, vocab_size=vocab_size)


def decode(engine: Engine, state: DecodeState) -> DecodeState:
    """Runs a batch to its end as one `lax.while_loop`; to be called under jit."""
    carry = jax.lax.while_loop(lambda c: c.state.live_B.any(), engine.full_step, engine.start(state))
    return carry.state


def take_columns(x: Array, start_B: Int[Array, "B"], *, width: int) -> Array:
    """The columns [start, start + width) of every row of x [B, L, ...]; the caller keeps them inside."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width, axis=0))(x, start_B)


def put_columns(x: Array, new: Array, start_B: Int[Array, "B"]) -> Array:
    """x [B, L] with the columns from start on replaced by new [B, Q]."""
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=0))(
        x, new, start_B
    )


def freeze(new: Any, old: Any, active_B: Bool[Array, "B"]) -> Any:
    """A tree of per-row arrays, new for the active rows and old for the others."""
    return jax.tree.map(
        lambda n, o: jnp.where(jnp.expand_dims(active_B, tuple(range(1, n.ndim))), n, o), new, old
    )
