"""The filter of Learn2PD (arXiv 2509.25188, section 3.2): from the confidences of a block to its final tokens."""

import dataclasses
import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """The shape of a filter. The published one has block 32, two layers, width 32: 2,112 parameters."""

    block_length: int  # positions of a block, B: inputs and outputs
    num_layers: int = 2
    width: int = 32  # of the layers between

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of every layer."""
        sizes = (self.block_length, *(self.width,) * (self.num_layers - 1), self.block_length)
        return tuple(itertools.pairwise(sizes))


class ConfidenceFilter(nnx.Module):
    """Linear layers with ReLU between them.

    Args:
        config: the shape.
        rngs: of the first weights.
    """

    def __init__(self, config: FilterConfig, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(inputs, outputs, rngs=rngs) for inputs, outputs in config.layer_sizes])

    def __call__(self, confidence_BQ: Float[Array, "B Q"]) -> Float[Array, "B Q"]:
        """Logits of "the token predicted here is the one of one-by-one decoding".

        Args:
            confidence_BQ: probability of the likeliest token at every position of the block, also the committed ones;
                0 behind the end of a block that was cut.
        """
        x = confidence_BQ
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)
