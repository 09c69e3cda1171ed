"""EB-Sampler (arXiv 2505.24857): a bound on the entropy of what is committed together."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "eb"
    config.eb.gamma = 0.1
    return config
