"""A smaller LLaDA from scratch on the built-in tasks, useful after 20 minutes on two cores."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.network.update(scratch=True, num_layers=4, embed_dim=128, num_heads=4, mlp_dim=384)
    config.data.update(samples=60_000, shares="equal", length=160)
    config.train.update(
        steps=2000,
        batch_size=32,
        learning_rate=3e-3,
        warmup_steps=100,
        ema=0.99,
        log_every=50,
        eval_every=500,
        checkpoint_every=100,
    )
    config.decode.update(batch_size=32)
    config.output.path = "out/train_tiny_cpu"
    return config
