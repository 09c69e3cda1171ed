"""The ablations of DiCo's paper (arXiv 2602.23792); `python -m decode.sweep` runs them all."""

from ml_collections import ConfigDict

from configs import dico

VARIANTS = {
    "dico": {},
    "no_trajectory_guidance": {"weighting": "none"},
    "finalize_by_confidence": {"margin": 1e9},
    "n1": {"num_seeds": 1},
    "n2": {"num_seeds": 2},
    "n4": {"num_seeds": 4},
    "n16": {"num_seeds": 16},
}


def get_config(variant: str = "dico") -> ConfigDict:
    config = dico.get_config()
    config.dico.update(VARIANTS[variant])
    return config
