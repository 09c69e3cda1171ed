"""WINO (arXiv 2507.18578): commit widely, take back what does not hold; released numbers."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "wino"
    config.wino.threshold = 0.6
    config.wino.keep = 0.9
    config.wino.max_accept = 20
    return config
