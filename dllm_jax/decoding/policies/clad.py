"""CLAD (arXiv 2605.29607, github.com/ziyigu2004/CLAD): of two clusters that look at each other, one is committed.

Released: threshold 0.7, the last 4 layers.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding import canvas
from dllm_jax.decoding.policies.base import Commit, Policy, View, Wants, best, full
from dllm_jax.decoding.policies.runs import run_numbers
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise

PAIR = 1.2  # two clusters alone are in conflict from this multiple of an even share of the attention on


@struct.dataclass
class Clad(Policy):
    """Candidates, of at least the threshold, form clusters with their neighbours; conflicts drop the shorter one."""

    threshold: Float[Array, ""]
    layers: int = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        """Attention."""
        return Wants(attention=self.layers)

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The candidates and the best, less the clusters that lose a conflict."""
        assert view.looks is not None
        confidence_BQ, slots = prediction.confidence_BQ, view.open_BQ.shape[1]
        candidate_BQ = view.open_BQ & (confidence_BQ >= self.threshold) | best(confidence_BQ, view.open_BQ)
        rows_BSQ = jnp.pad(view.looks.rows_BQS.swapaxes(1, 2), ((0, 0), (0, slots), (0, 0)))
        looks_BQQ = canvas.take_columns(rows_BSQ, view.start_B, width=slots)
        relation_BQQ = jnp.maximum(looks_BQQ, looks_BQQ.swapaxes(1, 2)) * (1 - jnp.eye(slots))[None]
        mask_BQ = candidate_BQ & ~jax.vmap(lost)(run_numbers(candidate_BQ), relation_BQQ, view.block_BQ.sum(axis=1))
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)


def lost(number_Q: Int[Array, "Q"], relation_QQ: Float[Array, "Q Q"], columns: Int[Array, ""]) -> Bool[Array, "Q"]:
    """Slots of clusters that lose a conflict: with the one that they are closest to, which is closest to them.

    Two clusters are as close as the slot of one that looks most, on average, at the other. Shorter ones lose, of equals
    the right one.

    Args:
        number_Q: the cluster of every slot, -1 for none.
        relation_QQ: how much two slots look at each other.
        columns: of the block.
    """
    slots = len(number_Q)
    cluster_K = jnp.arange(slots)
    member_KQ = number_Q[None, :] == cluster_K[:, None]
    size_K = member_KQ.sum(axis=1)
    count = (size_K > 0).sum()
    to_QK = relation_QQ @ member_KQ.T.astype(relation_QQ.dtype) / jnp.maximum(size_K, 1)[None, :]
    numbered_Q = jnp.where(number_Q < 0, slots, number_Q)
    close_KK = jax.ops.segment_max(to_QK, numbered_Q, num_segments=slots + 1)[:slots]
    is_pair_KK = (size_K > 0)[:, None] & (size_K > 0)[None, :] & ~jnp.eye(slots, dtype=bool)
    close_KK = jnp.where(is_pair_KK, jnp.maximum(close_KK, close_KK.T), 0)
    mean_K = close_KK.sum(axis=1) / jnp.maximum(count - 1, 1)
    top_K = jnp.argmax(jnp.where(is_pair_KK, close_KK, -jnp.inf), axis=1)
    most_K = jnp.take_along_axis(close_KK, top_K[:, None], axis=1)[:, 0]
    is_close_K = jnp.where(count == 2, most_K >= PAIR / columns, (most_K >= mean_K) & (most_K >= mean_K[top_K]))
    conflict_K = (count > 1) & (size_K > 0) & (top_K[top_K] == cluster_K) & is_close_K
    loses_K = conflict_K & ((size_K < size_K[top_K]) | ((size_K == size_K[top_K]) & (cluster_K > top_K)))
    return (number_Q >= 0) & loses_K[jnp.maximum(number_Q, 0)]
