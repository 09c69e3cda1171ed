"""LocalLeap: less confidence is enough near a sure token; released numbers, without a cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "local_leap"
    config.local_leap.threshold = 0.9
    config.local_leap.relaxed = 0.75
    config.local_leap.radius = 4
    return config
