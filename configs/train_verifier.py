"""A verifier for the bundled LLaDA, trained from scratch on the built-in tasks."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.verifier.config import VerifierTraining


def get_config() -> ConfigDict:
    return to_config_dict(VerifierTraining())
