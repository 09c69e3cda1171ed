"""AdaBlock (arXiv 2509.26432): blocks to the end of a phrase, over a dual cache; delimiters of llada-tiny."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    config.decode.blocks = "adaptive"
    config.decode.cache = "dual"
    config.threshold.value = 0.9
    config.adaptive.delimiters = "17,19"
    config.adaptive.threshold = 0.3
    return config
