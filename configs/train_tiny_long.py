"""The bundled LLaDA, second part: what train_tiny.py made is taught canvases of up to 640 tokens (docs/training.md)."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.model.path = "out/train_tiny"
    config.network.max_length = 1152
    config.data.update(samples=200_000, longer=0.05, length=640, buckets="96,128,160,224,320,448", shortest=64)
    config.objective.update(padding_weight=0.1, weighting="none", block_length=32, block_share=0.7)
    config.train.update(
        steps=1500,
        batch_size=32,
        learning_rate=3e-4,
        warmup_steps=50,
        ema=0.99,
        log_every=25,
        eval_every=250,
        checkpoint_every=100,
    )
    config.decode.update(gen_length=256, batch_size=32)
    config.output.path = "out/train_tiny_long"
    return config
