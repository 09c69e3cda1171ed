"""Settings that several training commands have. This module imports no JAX, as `dllm_jax/config.py`."""

import dataclasses

from dllm_jax.errors import UsageError
from dllm_jax.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimisation (AdamW), and how often it reports."""

    steps: int = setting(6000, "optimiser steps")
    batch_size: int = setting(4, "rows of a step")
    learning_rate: float = setting(2e-3, "its peak, after the warm-up; a cosine takes it down to 0")
    warmup_steps: int = setting(200, "steps over which the learning rate rises")
    b2: float = setting(0.98, "decay of the second moment")
    weight_decay: float = setting(0.03, "of matrices, not of norms and biases")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.0, "decay of a moving average of the weights, which is then measured and exported (0: none)")
    seed: int = setting(0, "seed of the first weights, the order of the data and the draws of the tasks")
    log_every: int = setting(200, "steps between two lines of metrics")
    eval_every: int = setting(2000, "steps between two measurements on the held-out samples")
    checkpoint_every: int = setting(500, "steps between two checkpoints, from which an interrupted run continues")


def validate_train(train: TrainSettings) -> None:
    """Checks the settings of the optimisation.

    Raises:
        UsageError: naming the field.
    """
    for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every"):
        at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("learning_rate", "weight_decay", "clip", "seed", "warmup_steps"):
        at_least(f"train.{name}", getattr(train, name), 0)
    for name in ("b2", "ema"):
        if not 0 <= getattr(train, name) < 1:
            raise UsageError(f"train.{name}: expected at least 0 and below 1, got {getattr(train, name)}")
    if train.warmup_steps >= train.steps:
        raise UsageError(f"train.warmup_steps: expected below train.steps {train.steps}, got {train.warmup_steps}")


@dataclasses.dataclass(frozen=True)
class TrainingOutput:
    """Where the result goes."""

    path: str = setting("out/verifier", "folder of the result; PATH.training holds checkpoints and metrics")
    overwrite: bool = setting(False, "replace a finished result, and discard an unfinished run with other settings")
