"""The extremely greedy parallel oracle (Learn2PD, arXiv 2509.25188, section 3.1): commits exactly what is right.

It knows the answer of one-by-one decoding. How many steps it needs is the mark for filters that reproduce that answer;
what it sees on the way is what they learn from.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry, take_columns
from dllm_jax.decoding.policies.base import Commit, Policy, Reported, Sizes, View, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState


@struct.dataclass
class ReplayLog:
    """What every forward of a row saw; F forwards at most, Q positions of its block."""

    confidence_BFQ: Float[Array, "B F Q"]
    correct_BFQ: Bool[Array, "B F Q"]  # the token predicted now is the answer's, at committed positions too
    masked_BFQ: Bool[Array, "B F Q"]
    block_BF: Int[Array, "B F"]
    step_BF: Int[Array, "B F"]  # in the block

    def row(self, i: int) -> dict[str, Any]:
        """No fields: the log is for training, not for output lines."""
        return {}


@struct.dataclass
class OracleState:
    """The policy's state."""

    predicted_BQ: Int[Array, "B Q"]  # in the forward before
    log: Reported


@struct.dataclass
class Oracle(Policy):
    """Commits the open positions whose prediction is the answer's.

    When a forward predicts the whole block as the one before did, nothing will change any more, and the rest of the
    block is filled with the answer. So a block of B positions takes at most B + 1 forwards.
    """

    answer_BG: Int[Array, "B G"]

    def most_forwards(self, geometry: Geometry) -> int:
        """One more per block than it has positions."""
        return geometry.gen_length + geometry.num_blocks

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> OracleState:
        """An empty log with room for every forward."""
        batch, slots = len(state.row_B), geometry.block_length
        forwards = self.most_forwards(geometry)
        nothing_BFQ = jnp.zeros((batch, forwards, slots), bool)
        zero_BF = jnp.zeros((batch, forwards), jnp.int32)
        log = ReplayLog(nothing_BFQ.astype(jnp.float32), nothing_BFQ, nothing_BFQ, zero_BF, zero_BF)
        return OracleState(jnp.zeros((batch, slots), jnp.int32), Reported(log))

    def commit(self, policy_state: OracleState, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """What is right, or all that is left."""
        slots = view.open_BQ.shape[1]
        answer_BQ = take_columns(self.answer_BG, view.position_BQ[:, 0], width=slots)
        correct_BQ = prediction.token_BQ == answer_BQ
        is_stuck_B = (view.block_nfe_B > 0) & (prediction.token_BQ == policy_state.predicted_BQ).all(axis=1)
        mask_BQ = view.open_BQ & (correct_BQ | is_stuck_B[:, None])

        seen = ReplayLog(
            prediction.confidence_BQ, correct_BQ, view.open_BQ, view.position_BQ[:, 0] // slots, view.block_nfe_B
        )
        row_B = jnp.arange(len(view.nfe_B))
        log = jax.tree.map(lambda old, new: old.at[row_B, view.nfe_B].set(new), policy_state.log.value, seen)
        policy_state = OracleState(prediction.token_BQ, Reported(log))
        return Commit(mask_BQ, answer_BQ, full(view.open_BQ, mask_BQ), policy_state)
