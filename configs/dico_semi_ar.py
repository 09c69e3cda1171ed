"""DiCo (arXiv 2602.23792), semi-autoregressive: divide and conquer inside each block, block after block."""

from ml_collections import ConfigDict

from configs import dico


def get_config() -> ConfigDict:
    config = dico.get_config()
    config.decode.block_length = 32
    config.dico.num_seeds = 4
    return config
