"""Hierarchical decoding of dInfer (arXiv 2510.08666): one token per run of masks, over a dual cache."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "hierarchy"
    config.decode.cache = "dual"
    config.hierarchy.threshold = 0.9
    config.hierarchy.low = 0.4
    return config
