"""Fast-dLLM by threshold (arXiv 2505.22618): commit everything the model is sure of, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    config.decode.cache = "dual"
    config.threshold.value = 0.9
    return config
