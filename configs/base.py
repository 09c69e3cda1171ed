"""The defaults of every experiment: the bundled model, LLaDA's own sampler. Other files change what their name says."""

from ml_collections import ConfigDict

from dllm_jax.config import Config, to_config_dict


def get_config() -> ConfigDict:
    return to_config_dict(Config())
