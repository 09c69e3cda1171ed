"""Settings that several training commands have. This module imports no JAX, as `dllm_jax/config.py`."""

import dataclasses

from dllm_jax.errors import UsageError
from dllm_jax.settings import at_least, setting


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimisation, and how often it reports."""

    steps: int = setting(6000, "optimiser steps")
    optimizer: str = setting(
        "adamw",
        "adamw, or muon, which makes the updates of the layers' matrices orthogonal (fewer steps from scratch)",
        choices=("adamw", "muon"),
    )
    batch_size: int = setting(4, "rows of a step")
    learning_rate: float = setting(2e-3, "its peak, after the warm-up; a cosine takes it down to 0")
    warmup_steps: int = setting(200, "steps over which the learning rate rises")
    b2: float = setting(0.98, "decay of the second moment")
    weight_decay: float = setting(0.03, "of matrices, not of norms and biases (with muon of all)")
    clip: float = setting(1.0, "largest norm of the gradient (0: any)")
    microbatches: int = setting(1, "parts of a step's rows that run one after the other, for less memory")
    remat: bool = setting(False, "compute layers again in the backward pass instead of keeping what they made")
    ema: float = setting(0.0, "decay of a moving average of the weights, which is then measured and exported (0: none)")
    seed: int = setting(0, "seed of the first weights, the order of the data and the draws of the tasks")
    log_every: int = setting(200, "steps between two lines of metrics")
    eval_every: int = setting(2000, "steps between two measurements on the held-out samples")
    checkpoint_every: int = setting(500, "steps between two checkpoints, from which an interrupted run continues")

    @property
    def rows(self) -> int:
        """Rows that run at once."""
        return self.batch_size // self.microbatches


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
    at_least("train.microbatches", train.microbatches, 1)
    if train.batch_size % train.microbatches:
        raise UsageError(
            f"train.microbatches: expected a divisor of train.batch_size {train.batch_size}, got {train.microbatches}"
        )
    if train.warmup_steps >= train.steps:
        raise UsageError(f"train.warmup_steps: expected below train.steps {train.steps}, got {train.warmup_steps}")


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """What is learnt from, and what is held out."""

    path: str = setting(
        "", "JSONL file: prompt + answer, or messages that end with it (default: built-in tasks)", filled=True
    )
    samples: int = setting(60_000, "samples to draw of the built-in tasks, none of them held out", least=1)
    shares: str = setting(
        "equal",
        "of each built-in task: equal parts, as the bundled models saw them (65% word problems), or of lists alone",
        choices=("equal", "bundled", "lists"),
    )
    longer: float = setting(0.0, "share of these draws that are longer: 10-40 words, 4-8 events", least=0, most=1)
    on_error: str = setting("fail", "what a bad line does: stop, or be left out", choices=("fail", "skip"))
    distill_path: str = setting(
        "", "learn the diffusion model's own answers to the prompts: decoded into this JSONL file, or read from it"
    )
    eval_path: str = setting(
        "", "JSONL file of held-out samples (default: the bundled ones, or lines of data.path)", filled=True
    )
    eval_samples: int = setting(125, "held-out samples to measure on; from data.path at most every tenth line", least=1)
    length: int = setting(
        192, "tokens of a row, in which several samples are packed; a longer sample is an error", least=2
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (LoRA, arXiv 2106.09685), trained instead of the weights."""

    rank: int = setting(0, "their rank (0: all weights are trained)", least=0)
    alpha: float = setting(32.0, "they are scaled by alpha / rank", above=0)
    targets: str = setting("all", "matrices that get one, by their names in the checkpoint, separated by commas (all)")
    merge: bool = setting(False, "write the whole model with the adapter in it, instead of the adapter")


@dataclasses.dataclass(frozen=True)
class TrainingOutput:
    """Where the result goes."""

    path: str = setting("out/verifier", "folder of the result; PATH.training holds checkpoints and metrics")
    overwrite: bool = setting(False, "replace a finished result, and discard an unfinished run with other settings")
