"""The smallest things that can be trained: shapes, samples, settings."""

import numpy as np

from dllm_jax.data.packing import Example
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.training.settings import TrainSettings

SHAPE = TransformerConfig(
    family="qwen2",
    num_layers=1,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=32,
    vocab_size=64,
    rope_theta=1e4,
    norm_eps=1e-6,
    max_length=64,
    qkv_bias=True,
    tied_embeddings=True,
    causal_block=1,
    eos_id=0,
)
SETTINGS = TrainSettings(steps=80, batch_size=8, learning_rate=2e-2, warmup_steps=5)
LENGTH = 16


def counting(count: int) -> list[Example]:
    """Prompts of one number, answered by the numbers that follow it; of several lengths."""
    return [
        Example(np.arange(first, first + 3 + first % 5, dtype=np.int32), 1) for first in (i % 50 for i in range(count))
    ]
