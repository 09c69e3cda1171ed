"""Adaptive parallel decoding as in its paper (arXiv 2506.00413): Dream-7B drafts, Qwen2.5-0.5B verifies.

The paths are the folders of the released weights. The paper's numbers were made with the released code, which takes the
likeliest token of the mixture as target: config.apd.target=argmax.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.path = "Dream-v0-Instruct-7B"
    config.verifier.path = "Qwen2.5-0.5B"
    config.decode.policy = "apd"
    config.decode.cache = "window"
    config.decode.gen_length = 256
    config.decode.temperature = 0.2
    config.decode.top_p = 0.95
    config.apd.mixture_weight = 0.7
    config.apd.kv_window = 16
    config.apd.max_lookahead = 100
    return config
