"""LLaDA2.1 as released: commit what is sure, and write over tokens that the model would not choose any more.

Its fast mode, as SGLang serves it: --config.edit.threshold=0.5 --config.edit.editing_threshold=0.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.path = "LLaDA2.1-mini"
    config.decode.policy = "edit"
    config.decode.cache = "block"
    config.decode.stop = "block_eos"
    config.decode.block_length = 32
    config.edit.threshold = 0.95
    config.edit.editing_threshold = 0.9
    config.edit.max_post_steps = 16
    config.edit.min_tokens = 1
    return config
