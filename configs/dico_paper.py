"""DiCo's two settings in its paper (arXiv 2602.23792), for LLaDA-8B: `dico_paper.py:b256` (no blocks) and `:b128`."""

from ml_collections import ConfigDict

from configs import dico


def get_config(setting: str = "b256") -> ConfigDict:
    config = dico.get_config()
    config.model.path = "LLaDA-8B-Instruct"
    config.decode.gen_length = 256
    config.decode.block_length, config.dico.num_seeds = {"b256": (256, 8), "b128": (128, 4)}[setting]
    return config
