"""The command whose runs are tested here."""

import pytest

from dllm_jax.training.verifier.config import VerifierTraining
from tests.training.commands import Command
from train.verifier import main

FLAGS = ("network.num_layers=1", "network.embed_dim=16", "network.mlp_dim=32")


@pytest.fixture(scope="session")
def command() -> Command:
    """A verifier."""
    return Command("train.verifier", main, "train_verifier.py", VerifierTraining, FLAGS)
