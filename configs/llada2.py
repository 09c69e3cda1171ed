"""LLaDA2.0 (arXiv 2512.15745) as released: all that is sure in a block of 32, over an exact cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.path = "LLaDA2.0-mini"
    config.decode.policy = "dynamic"
    config.decode.cache = "block"
    config.decode.stop = "block_eos"
    config.decode.block_length = 32
    config.dynamic.threshold = 0.95
    return config
