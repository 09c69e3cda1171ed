"""DAWN (arXiv 2602.06953): positions that do not depend on each other; released numbers, 4 layers of 32."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "dawn"
    config.dawn.threshold = 0.9
    config.dawn.relaxed = 0.7
    config.dawn.low = 0.75
    config.dawn.edge = 0.07
    config.dawn.sink = 0.01
    config.dawn.layers = 4
    return config
