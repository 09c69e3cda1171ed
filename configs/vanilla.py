"""LLaDA's own sampler (arXiv 2502.09992): one token per forward, the most confident first, block by block."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "low_confidence"
    config.decode.block_length = 32
    return config
