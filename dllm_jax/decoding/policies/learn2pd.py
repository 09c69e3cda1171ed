"""Learn2PD (arXiv 2509.25188, section 3.2): a small trained filter says which predicted tokens are final already."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dllm_jax.checkpoints import filters
from dllm_jax.checkpoints.filters import Filter
from dllm_jax.config import Config
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, Parts, Policy, Sizes, View, full
from dllm_jax.decoding.policies.companions import Companion
from dllm_jax.decoding.policies.confidence import scheduled, steps_per_block
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, top_n
from dllm_jax.decoding.state import DecodeState
from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model
from dllm_jax.settings import block_schedule


@struct.dataclass
class Learn2pd(Policy):
    """Commits what the filter accepts, sigmoid(f(c)) > tau, and the scheduled number of the most confident positions.

    At least one of those, whatever the schedule says: the block goes on until it is full.
    """

    params: nnx.State  # of the filter
    threshold: Float[Array, ""]
    steps_per_block: Int[Array, ""]
    graphdef: Any = struct.field(pytree_node=False)  # of the filter

    @property
    def noted(self) -> tuple[str, ...]:
        """What the filter says of every slot: the share that is compared with the threshold."""
        return ("filter",)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Int[Array, "B"]:
        """Masks of the block when the row entered it."""
        return jnp.zeros_like(state.nfe_B)

    def commit(self, policy_state: Int[Array, "B"], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """What is accepted, and the best n open slots."""
        masks_B = jnp.where(view.block_nfe_B == 0, view.open_BQ.sum(axis=-1), policy_state)
        n_B = jnp.maximum(scheduled(masks_B, view.block_nfe_B, self.steps_per_block), 1)
        says_BQ = jax.nn.sigmoid(self.logits(prediction, view))
        accepted_BQ = view.open_BQ & (says_BQ > self.threshold)
        mask_BQ = accepted_BQ | top_n(prediction.confidence_BQ, view.open_BQ, n_B)
        leave_B = full(view.open_BQ, mask_BQ)
        return Commit(mask_BQ, prediction.token_BQ, leave_B, masks_B, accepted_BQ=accepted_BQ, noted=(says_BQ,))

    def logits(self, prediction: Prediction, view: View) -> Float[Array, "B Q"]:
        """The filter on the confidences of the whole block, committed positions too; 0 behind the row's end."""
        column_BQ = view.start_B[:, None] + jnp.arange(view.open_BQ.shape[1])[None, :]
        confidence_BQ = jnp.where(column_BQ < view.end_B[:, None], prediction.confidence_BQ, 0.0)
        return nnx.merge(self.graphdef, self.params)(confidence_BQ)


class LearnedFilter(Companion):
    """The filter, made for blocks of one length."""

    name, argument = "filter", "filter_params"
    kind, told = Mapping, "arrays by name"
    expected = "the filter that decode.policy learn2pd needs"

    def place(self, config: Config) -> Path:
        """See `filters.resolve_filter`."""
        return filters.resolve_filter(self.path(config))

    def open(self, config: Config, mesh: Mesh) -> Filter:
        """See `filters.load_filter`."""
        return filters.load_filter(self.path(config))

    def accept(self, value: Mapping[str, Any]) -> Filter:
        """Of its arrays."""
        return filters.from_arrays(value)

    def check(self, network: Filter, config: Config, *, model: Model) -> None:
        """It is for the blocks of the decode, or for the parts of them that are open at once."""
        decode = config.decode
        block_length = decode.block_length if model.config.block_causal else block_schedule(decode)[0]
        name, open_length = "decode.block_length", block_length
        if decode.sub_block_length:
            name, open_length = "decode.sub_block_length", decode.sub_block_length
        if network.config.block_length != open_length:
            raise UsageError(f"{name}: expected {network.config.block_length}, as the filter has it, got {open_length}")


def build(config: Config, parts: Parts) -> Learn2pd:
    """The policy of the settings."""
    filter_ = parts.companions[LearnedFilter.name]
    threshold = jnp.float32(config.learn2pd.threshold)
    return Learn2pd(filter_.params, threshold, steps_per_block(config.decode), filter_.graphdef)
