"""Streaming-dLLM's threshold (github.com/xiaoshideta/Streaming-dLLM): it falls as a block fills, dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    config.decode.cache = "dual"
    config.threshold.value = 0.9
    config.threshold.decay = 0.4
    return config
