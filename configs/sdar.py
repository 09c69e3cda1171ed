"""SDAR (arXiv 2510.06303) as its authors evaluate it: all that is sure in a block of 4, over an exact cache.

Their generate.py has 0.85 for the threshold; 1 is their static schedule, and --config.decode.policy=sequential their
third rule. The folder is the released one; the blocks are those of its name.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.path = "SDAR-8B-Chat"
    config.decode.policy = "dynamic"
    config.decode.cache = "block"
    config.decode.stop = "block_eos"
    config.decode.block_length = 0
    config.dynamic.threshold = 0.95
    return config
