"""What one forward must cost: the arithmetic and the memory traffic that no implementation can avoid.

Counted are matrix products, weights read once (of the embedding only the rows that tokens name), keys and values. Left
out as negligible are activations, norms, rotations and softmax. Shape letters as in `models/layers.py`.
"""

from typing import NamedTuple

from dllm_jax.models.transformer import TransformerConfig


class Cost(NamedTuple):
    """Work of one forward."""

    flops: float  # a multiplication and an addition are two
    bytes: float  # read from and written to device memory

    def split(self, parts: int) -> "Cost":
        """The share of each of `parts` devices, if the work divides evenly and talking costs nothing."""
        return Cost(self.flops / parts, self.bytes / parts)


def layer_parameters(config: TransformerConfig) -> int:
    """Parameters of one layer that take part in matrix products: q|k|v, attention output, gate|up and down."""
    query_width = config.stored_heads * config.head_dim
    key_width = config.stored_kv_heads * config.head_dim
    attention = config.embed_dim * (query_width + 2 * key_width) + query_width * config.embed_dim
    return attention + 3 * config.embed_dim * config.mlp_dim


def forward_cost(config: TransformerConfig, *, rows: int, columns: int, keys: int, slots: int, itemsize: int) -> Cost:
    """The cost of one forward of the model and of its head.

    Args:
        config: the model.
        rows: B, sequences that run (twice the batch under guidance).
        columns: T, columns of each that run.
        keys: S, columns that are attended to; T without a cache.
        slots: columns of each row whose logits are computed.
        itemsize: bytes of a cached key or value, and of a weight that is not quantized.
    """
    tokens, head = rows * columns, config.embed_dim * config.vocab_size
    attention = 4 * tokens * keys * config.stored_heads * config.head_dim  # queries x keys, then weights x values
    per_layer = 2 * tokens * layer_parameters(config) + attention
    flops = config.num_layers * per_layer + 2 * rows * slots * head

    key_values = 2 * config.stored_kv_heads * config.head_dim * rows * (columns + keys)  # the new written, all read
    norms = 2 * config.embed_dim
    biases = (config.stored_heads + 2 * config.stored_kv_heads) * config.head_dim if config.qkv_bias else 0
    others = config.num_layers * (norms + biases + key_values)
    others += (tokens + 1) * config.embed_dim  # embedding rows, final norm
    matrices = config.num_layers * layer_parameters(config)
    if config.quantize:  # the scales are few; a tied head is the embedding, which is not quantized
        stored = matrices + head * (itemsize if config.tied_embeddings else 1)
    else:
        stored = itemsize * (matrices + head)
    return Cost(flops=flops, bytes=itemsize * others + stored)
