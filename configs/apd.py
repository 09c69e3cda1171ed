"""Adaptive parallel decoding (arXiv 2506.00413): the bundled LLaDA drafts, the bundled causal model verifies.

At temperature 0, so that accuracy and speed stand beside those of the other experiments, which are deterministic too;
the paper's own setting is in apd_dream.py. On 300 held-out tasks a window of 32 known tokens loses little against no
cache (mean accuracy of the tasks .980 against .990, at 12.1 tokens per forward), one of 16 more (.953).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "apd"
    config.decode.cache = "window"
    config.verifier.path = "verifier-tiny"
    config.apd.mixture_weight = 0.7
    config.apd.kv_window = 32
    config.apd.max_lookahead = 64
    return config
