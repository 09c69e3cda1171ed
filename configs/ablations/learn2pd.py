"""Learn2PD and EoTP beside what they are compared with, under every cache; `python -m decode.sweep` runs them all."""

from typing import Any

from ml_collections import ConfigDict

from configs import learn2pd

POLICIES: dict[str, dict[str, Any]] = {
    "low_confidence": {"decode.policy": "low_confidence", "decode.stop": "none"},
    "threshold0.85": {"decode.policy": "threshold", "decode.stop": "none", "threshold.value": 0.85},
    "threshold0.9": {"decode.policy": "threshold", "decode.stop": "none", "threshold.value": 0.9},
    "threshold0.95": {"decode.policy": "threshold", "decode.stop": "none", "threshold.value": 0.95},
    "threshold0.9_eot": {"decode.policy": "threshold", "threshold.value": 0.9},
    "factor1": {"decode.policy": "factor", "decode.stop": "none"},
    "learn2pd": {"decode.stop": "none"},
    "learn2pd_eot": {},
}
VARIANTS = {
    f"{policy}_{cache}": settings | {"decode.cache": cache}
    for cache in ("none", "prefix", "dual")
    for policy, settings in POLICIES.items()
}


def get_config(variant: str = "learn2pd_eot_none") -> ConfigDict:
    config = learn2pd.get_config()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
