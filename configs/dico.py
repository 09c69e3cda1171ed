"""DiCo (arXiv 2602.23792), divide and conquer: on the whole canvas at once, as the paper's setting without blocks."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "dico"
    config.decode.block_length = 96
    config.dico.num_seeds = 8
    return config
