"""DSB (github.com/lizhuo-luo/DSB), greedy: a block that grows, with its cache and the threshold rule."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    config.decode.blocks = "growing"
    config.decode.cache = "sliding"
    config.threshold.value = 0.9
    config.sliding.margin = 24
    return config
