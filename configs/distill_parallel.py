"""The bundled LLaDA taught to commit more tokens per forward, by its own answers (after dParallel and d3LLM)."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.diffusion.config import DiffusionTraining


def get_config() -> ConfigDict:
    config = to_config_dict(DiffusionTraining())
    config.data.update(samples=20_000, shares="equal", length=192, distill_path="out/distill_parallel.answers.jsonl")
    config.objective.update(
        weighting="none", order="trajectory", block_length=32, certainty=1.0, certainty_temperature=0.5
    )
    config.train.update(
        steps=1000,
        batch_size=32,
        learning_rate=3e-4,
        warmup_steps=50,
        ema=0.99,
        log_every=50,
        eval_every=250,
        checkpoint_every=100,
    )
    config.decode.update(batch_size=32)
    config.threshold.value = 0.9
    config.output.path = "out/distill_parallel"
    return config
