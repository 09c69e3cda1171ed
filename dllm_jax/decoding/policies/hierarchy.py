"""dInfer's hierarchical decoding (arXiv 2510.08666, github.com/inclusionAI/dInfer): one token per run of masks.

The surest token of a run divides it, so that a block falls into shorter and shorter runs, in logarithmically many
forwards at best. Released: threshold 0.9, low 0.4.
"""

from flax import struct
from jaxtyping import Array, Float

from dllm_jax.decoding.policies.base import Commit, Policy, View, best, full
from dllm_jax.decoding.policies.runs import run_heads, run_numbers
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise


@struct.dataclass
class Hierarchy(Policy):
    """Commits what is above the threshold, and of every maximal run of open slots the surest above the lower one."""

    threshold: Float[Array, ""]
    low: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The sure ones, the heads of runs, and always the best."""
        confidence_BQ = prediction.confidence_BQ
        heads_BQ = run_heads(run_numbers(view.open_BQ), confidence_BQ) & (confidence_BQ > self.low)
        sure_BQ = view.open_BQ & (confidence_BQ > self.threshold)
        mask_BQ = heads_BQ | sure_BQ | best(confidence_BQ, view.open_BQ)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)
