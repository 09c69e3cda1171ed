"""Dream's own sampler (arXiv 2508.15487, `diffusion_generate` of the release): time falls evenly, the surest go first.

From time t to s a mask is lifted with probability 1 - s / t, so a step commits that share of the masks left: the best
by one of three scores. All positions compete; there are no blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Policy, View, Wants, full
from dllm_jax.decoding.prediction import Prediction, proposable
from dllm_jax.decoding.sampling import Noise, top_n

LOG_FLOOR = 1e-10  # keeps the logarithm of a probability 0 finite


def shares(steps: int, *, eps: float) -> Float[np.ndarray, "S"]:
    """The share of the masks left that every step commits, float32; all of them in the last.

    Args:
        steps: forwards, S.
        eps: the time after the last step; it begins at 1.
    """
    start, end = np.float32(1), np.float32(eps)
    step = (end - start) / np.float32(steps)
    i = np.arange(steps + 1, dtype=np.float32)
    # Counted from both ends, as torch.linspace does: a different last bit can move a token to the next step.
    time = np.where(i < (steps + 1) // 2, start + step * i, end - step * (steps - i))
    share_S = 1 - time[1:] / time[:-1]
    share_S[-1] = 1
    return share_S


def top_probability(prediction: Prediction) -> Float[Array, "B Q"]:
    """`maskgit_plus`: the probability of the token."""
    return prediction.confidence_BQ


def probability_margin(prediction: Prediction) -> Float[Array, "B Q"]:
    """`topk_margin`: the probability of the best token minus the largest other; below 0 where [MASK] is surer."""
    probability_BQV = jax.nn.softmax(prediction.logits_BQV, axis=-1)
    allowed_BQV = proposable(probability_BQV, prediction.mask_id)
    best_BQ1 = jnp.argmax(allowed_BQV, axis=-1, keepdims=True)
    is_best_BQV = jnp.arange(probability_BQV.shape[-1])[None, None] == best_BQ1
    return jnp.max(allowed_BQV, axis=-1) - jnp.max(jnp.where(is_best_BQV, 0, probability_BQV), axis=-1)


def negative_entropy(prediction: Prediction) -> Float[Array, "B Q"]:
    """`entropy`: the sum of p log p."""
    probability_BQV = jax.nn.softmax(prediction.logits_BQV, axis=-1)
    return jnp.sum(probability_BQV * jnp.log(probability_BQV + LOG_FLOOR), axis=-1)


Score = Callable[[Prediction], Float[Array, "B Q"]]
SCORES: dict[str, Score] = {
    "maskgit_plus": top_probability,
    "topk_margin": probability_margin,
    "entropy": negative_entropy,
}


@struct.dataclass
class DreamOrder(Policy):
    """Commits the scheduled share of all masks, rounded down (none is possible), by a score."""

    share_S: Float[Array, "S"]
    score: Score = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        """Two of the scores are of the whole distribution."""
        return Wants(logits=True)

    def most_forwards(self, geometry: Geometry) -> int:
        """Its steps; the last commits all that is left."""
        return len(self.share_S)

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The best int(masks * share) open slots."""
        n_B = (view.open_BQ.sum(axis=-1) * self.share_S[view.block_nfe_B]).astype(jnp.int32)
        mask_BQ = top_n(self.score(prediction), view.open_BQ, n_B)
        is_last_B = view.block_nfe_B + 1 >= len(self.share_S)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ) | is_last_B, policy_state)
