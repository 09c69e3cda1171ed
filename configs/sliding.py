"""DSB (github.com/lizhuo-luo/DSB), constant: a block that slides, with its cache and the threshold rule."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    config.decode.blocks = "sliding"
    config.decode.cache = "sliding"
    config.threshold.value = 0.9
    config.sliding.margin = 24
    return config
