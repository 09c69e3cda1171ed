"""A smaller LLaDA from scratch on the built-in tasks, for two cores (docs/training.md)."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.network.update(scratch=True, num_layers=4, embed_dim=128, num_heads=4, mlp_dim=384)
    config.data.update(samples=60_000, shares="equal", length=160, buckets="96,128", shortest=64)
    config.objective.update(padding_weight=0.1, weighting="none", block_length=32, block_share=0.5)
    config.train.update(
        steps=3500,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=200,
        ema=0.99,
        log_every=100,
        eval_every=1000,
        checkpoint_every=250,
    )
    config.decode.update(batch_size=32)
    config.output.path = "out/train_tiny_cpu"
    return config
