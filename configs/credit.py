"""CreditDecoding (arXiv 2510.06133): tokens proposed again and again gain confidence, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "credit"
    config.decode.cache = "dual"
    config.credit.threshold = 0.9
    config.credit.alpha = 0.7
    config.credit.gamma = 0.2
    config.credit.beta = 0.8
    return config
