"""KLASS (arXiv 2511.05664): sure and at rest; released for LLaDA with these numbers, without a cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "klass"
    config.klass.confidence = 0.6
    config.klass.divergence = 0.015
    config.klass.history = 2
    return config
