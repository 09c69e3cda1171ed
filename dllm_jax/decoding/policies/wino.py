"""WINO (arXiv 2507.18578, github.com/Feng-Hong/WINO-DLLM): commits widely, and takes back what does not hold.

Every forward also asks, for each committed token of the block, how probable it is where it cannot be seen itself (see
`shadows.py`). Released: threshold 0.6, keep 0.9, at most 20 tokens per forward. A forward costs the canvas and a block.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Policy, Sizes, View, Wants, best, full
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, top_n
from dllm_jax.decoding.state import DecodeState

SHARE, LEAST = 0.7, 5  # of a block's masks may be committed at once; so many always
FIRST = 30  # stands for the tokens of the forward before a block's first


@struct.dataclass
class Wino(Policy):
    """Commits what is above the threshold, up to a cap, and takes back fewer tokens than the forward before committed.

    So a block of n masks takes at most n forwards: one that commits k is answered by at most k - 1 taken back.
    """

    threshold: Float[Array, ""]
    keep: Float[Array, ""]
    max_accept: Int[Array, ""]

    @property
    def wants(self) -> Wants:
        """The shadows of the block."""
        return Wants(shadow=True)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Int[Array, "B"]:
        """Tokens that the last forward committed."""
        return jnp.zeros_like(state.nfe_B)

    def commit(self, policy_state: Int[Array, "B"], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """What is sure enough, at least the best; and what is taken back, unless only one token is committed."""
        confidence_BQ = prediction.confidence_BQ
        sure_BQ = view.open_BQ & (confidence_BQ > self.threshold)
        capped_BQ = top_n(confidence_BQ, sure_BQ, self.cap(view))
        mask_BQ = jnp.where(sure_BQ.any(axis=1, keepdims=True), capped_BQ, best(confidence_BQ, view.open_BQ))
        count_B = mask_BQ.sum(axis=1)
        last_B = jnp.where(view.block_nfe_B == 0, FIRST, policy_state)
        retract_BQ = self.doubted(view, most_B=last_B - 1) & (count_B > 1)[:, None]
        left_BQ = view.open_BQ | retract_BQ
        return Commit(mask_BQ, prediction.token_BQ, full(left_BQ, mask_BQ), count_B, retract_BQ=retract_BQ)

    def cap(self, view: View) -> Int[Array, "B"]:
        """The most tokens to commit."""
        slots = view.open_BQ.shape[1]
        share_W = jnp.asarray(np.array([int(SHARE * masks) for masks in range(slots + 1)], np.int32))
        return jnp.minimum(jnp.maximum(share_W[view.open_BQ.sum(axis=1)], LEAST), self.max_accept)

    def doubted(self, view: View, *, most_B: Int[Array, "B"]) -> Bool[Array, "B Q"]:
        """The least probable of the block's committed tokens that are not probable enough, at most so many."""
        assert view.shadow_BQ is not None
        doubted_BQ = view.block_BQ & ~view.open_BQ & (view.shadow_BQ < self.keep)
        return top_n(-view.shadow_BQ, doubted_BQ, most_B)
