"""Generation lengths from 96 to 512 with every cache, by the plain threshold and one token per forward.

`python -m decode.sweep --config=ablations/lengths --config.output.path=FOLDER` runs them all, on 20 samples of each
bundled task; a single one of them is `--config=ablations/lengths:threshold_256_none`, with `--config.eval.full=true`
on all 500. One token per forward ends with the text (EoTP), or else 512 tokens would take 512 forwards.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {"decode.policy": "threshold", "threshold.value": 0.9},
    "low_confidence": {"decode.policy": "low_confidence", "decode.stop": "eot"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{policy}_{length}_{cache}": settings | {"decode.gen_length": length, "decode.cache": cache}
    for policy, settings in POLICIES.items()
    for length in (96, 128, 256, 512)
    for cache in ("none", "prefix", "dual")
}


def get_config(variant: str = "threshold_96_none") -> ConfigDict:
    config = base.get_config()
    config.decode.batch_size = 32
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
