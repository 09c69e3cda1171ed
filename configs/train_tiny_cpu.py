"""A smaller LLaDA from scratch on the built-in lists, in minutes on two cores (docs/training.md)."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.network.update(scratch=True, num_layers=3, embed_dim=128, num_heads=4, mlp_dim=384, max_length=84)
    config.data.update(samples=60_000, shares="lists", length=84, shortest=48)
    config.objective.update(padding_weight=0.1, weighting="none")
    config.train.update(
        steps=5000,
        batch_size=16,
        optimizer="muon",
        learning_rate=4e-3,
        warmup_steps=200,
        ema=0.99,
        log_every=100,
        eval_every=2500,
        checkpoint_every=500,
    )
    config.decode.update(gen_length=32, batch_size=32)
    config.output.path = "out/train_tiny_cpu"
    return config
