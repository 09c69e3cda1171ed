"""CLAD (github.com/ziyigu2004/CLAD): clusters that do not look at each other; released numbers, 4 layers of 32."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "clad"
    config.clad.threshold = 0.7
    config.clad.layers = 4
    return config
