"""A filter for the bundled LLaDA: 200 prompts of the built-in tasks, decoded without a cache."""

from ml_collections import ConfigDict

from dllm_jax.config import to_config_dict
from dllm_jax.training.filter.config import FilterTraining


def get_config() -> ConfigDict:
    return to_config_dict(FilterTraining())
