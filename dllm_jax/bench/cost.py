"""What one forward must cost: the arithmetic and the memory traffic that no implementation can avoid.

Counted are matrix products, weights read once (of the embedding only the rows that tokens name, of experts those that
some token goes to, as many as there would be if all were equally likely), keys and values. Left out as negligible are
activations, norms, rotations and softmax. Shape letters as in `models/layers.py`.
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
    """Parameters of one layer with an MLP that take part in matrix products: attention, gate|up and down."""
    return attention_parameters(config) + 3 * config.embed_dim * config.mlp_dim


def attention_parameters(config: TransformerConfig) -> int:
    """Those of q|k|v and of the attention's output."""
    query_width = config.stored_heads * config.head_dim
    key_width = config.stored_kv_heads * config.head_dim
    return config.embed_dim * (query_width + 2 * key_width) + query_width * config.embed_dim


def parameters_used(config: TransformerConfig, *, tokens: int) -> tuple[float, float]:
    """Parameters of all layers that one token is multiplied with, and those that are read for all tokens.

    Args:
        config: the model.
        tokens: that run at once.
    """
    experts = config.experts
    dense = config.num_layers - sum(not config.is_dense(layer) for layer in range(config.num_layers))
    alike = dense * layer_parameters(config)
    if experts is None:
        return alike, alike
    own = attention_parameters(config) + config.embed_dim * (experts.count + 3 * experts.shared_dim)
    each = 3 * config.embed_dim * experts.hidden_dim
    touched = experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)
    mixed = config.num_layers - dense
    return alike + mixed * (own + experts.per_token * each), alike + mixed * (own + touched * each)


def weights_cost(config: TransformerConfig, *, tokens: int, itemsize: int) -> Cost:
    """What reading the weights costs that so many tokens need; arguments as of `forward_cost`."""
    norms = 2 * config.embed_dim + (2 * config.head_dim if config.qk_norm else 0)
    biases = (config.stored_heads + 2 * config.stored_kv_heads) * config.head_dim if config.qkv_bias else 0
    others = config.num_layers * (norms + biases) + config.embed_dim  # and the final norm
    matrices, head = parameters_used(config, tokens=tokens)[1], config.embed_dim * config.vocab_size
    if config.quantize:  # the scales are few; a tied head is the embedding, which is not quantized
        stored = matrices + head * (itemsize if config.tied_embeddings else 1)
    else:
        stored = itemsize * (matrices + head)
    return Cost(flops=0, bytes=itemsize * others + stored)


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
    products = 2 * tokens * parameters_used(config, tokens=tokens)[0] + 2 * rows * slots * head
    key_values = 2 * config.stored_kv_heads * config.head_dim * rows * (columns + keys)  # the new written, all read
    rows_named = tokens * config.embed_dim  # of the embedding
    weights = weights_cost(config, tokens=tokens, itemsize=itemsize)
    moved = itemsize * (config.num_layers * key_values + rows_named)
    return Cost(flops=products + config.num_layers * attention, bytes=weights.bytes + moved)
