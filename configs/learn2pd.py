"""Learn2PD with EoTP (arXiv 2509.25188): a filter says which tokens are final, rows stop at their end of text."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "learn2pd"
    config.decode.stop = "eot"
    config.filter.path = "filter-tiny"
    return config
