"""Fast-dLLM by factor (arXiv 2505.22618): the surer the model, the more tokens at once, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "factor"
    config.decode.cache = "dual"
    config.factor.value = 1.0
    return config
