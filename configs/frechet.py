"""Fast-dLLM++ (arXiv 2606.02955): a Fréchet bound on the joint, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "frechet"
    config.decode.cache = "dual"
    config.frechet.delta = 0.25
    return config
