"""Dream's own sampler (arXiv 2508.15487), by entropy: for a Dream checkpoint in model.path, but any model will do."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "entropy"
    config.decode.temperature = 0.2
    config.decode.top_p = 0.95
    return config
