"""The bundled LLaDA from scratch, first part: 400,000 samples of the built-in tasks, for an accelerator."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.network.scratch = True
    config.data.update(shares="bundled", on_error="skip")  # some word problems outgrow the canvas
    config.train.update(
        steps=12_350,
        batch_size=512,
        learning_rate=3e-3,
        warmup_steps=300,
        ema=0.999,
        log_every=100,
        eval_every=2000,
        checkpoint_every=1000,
    )
    config.decode.update(batch_size=125)
    config.output.path = "out/train_tiny"
    return config
