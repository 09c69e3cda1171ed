"""Every rule for parallel commits with the numbers that its authors released, on one model, without a cache.

`python -m decode.sweep --config=configs/ablations/parallel.py` runs them all; `docs/decoders.md` defines them.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

# Blocks that move or grow and thresholds that fall are variants of the plain threshold.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "threshold": {},
    "threshold_0.8": {"threshold": {"value": 0.8}},
    "factor": {"decode": {"policy": "factor"}},
    **{
        policy: {"decode": {"policy": policy}}
        for policy in (
            "frechet",
            "klass",
            "local_leap",
            "dawn",
            "clad",
            "r2",
            "hierarchy",
            "credit",
            "eb",
            "entropy_threshold",
            "wino",
        )
    },
    "decay": {"threshold": {"decay": 0.4}},
    "sliding": {"decode": {"blocks": "sliding"}},
    "growing": {"decode": {"blocks": "growing"}},
    "sliding_cache": {"decode": {"blocks": "sliding", "cache": "sliding"}},
    "adaptive": {"decode": {"blocks": "adaptive"}, "adaptive": {"delimiters": "17,19"}},
    "pipelined": {"decode": {"policy": "entropy_threshold", "blocks": "pipelined"}},
    "settled": {"decode": {"stop": "settled"}},
}


def get_config(variant: str = "threshold") -> ConfigDict:
    config = base.get_config()
    config.decode.policy = "threshold"
    for section, values in VARIANTS[variant].items():
        config[section].update(values)
    return config
