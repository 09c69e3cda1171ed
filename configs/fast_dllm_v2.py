"""Fast-dLLM v2 (arXiv 2509.26328) as in its model card: blocks of 32 in parts of 8, by threshold, over an exact cache.

Its block cache within a block, which is not exact: --config.decode.sub_block_cache=true. As released, some tokens at
the end are missing if decode.gen_length is whole blocks (docs/decoders.md, "Fewer tokens than were asked for").
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.path = "Fast_dLLM_v2_7B"
    config.decode.policy = "threshold"
    config.decode.cache = "block"
    config.decode.stop = "early_eos"
    config.decode.block_length = 32
    config.decode.sub_block_length = 8
    config.threshold.value = 0.9
    return config
