"""The command whose runs are tested here."""

import pytest

from dllm_jax.training.diffusion import held_out
from dllm_jax.training.diffusion.config import DiffusionTraining
from dllm_jax.training.held_out import HeldOutPrompts
from tests.training.commands import FROM_FOLDER, Command
from train.diffusion import main

FLAGS = (
    *FROM_FOLDER,
    "data.shares=equal",
    "data.length=160",
    "objective.padding_weight=1",
    "objective.weighting=linear",
    "train.optimizer=adamw",
    "train.learning_rate=2e-3",
)


@pytest.fixture(scope="session")
def command() -> Command:
    """A diffusion model."""
    return Command("train.diffusion", main, "train_tiny_cpu.py", DiffusionTraining, FLAGS)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the slow half of the measurements."""
    monkeypatch.setattr(held_out, "decode_all", lambda decoder, prompts: None)
    monkeypatch.setattr(HeldOutPrompts, "measured", lambda self, result: {"tokens_per_forward": 1.0})
