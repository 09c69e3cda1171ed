"""Generation lengths from 96 to 512 with every cache, one token per forward and by the plain threshold.

`python -m decode.sweep --config=ablations/lengths --config.output.path=FOLDER` runs them all, on 20 samples of each
bundled task; a single one of them is `--config=ablations/lengths:threshold_256_none`, with `--config.eval.full=true`
on all 500.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = [
    f"{policy}_{length}_{cache}"
    for policy in ("threshold", "low_confidence")
    for length in (96, 128, 256, 512)
    for cache in ("none", "prefix", "dual")
]


def get_config(variant: str = VARIANTS[0]) -> ConfigDict:
    policy, length, cache = variant.rsplit("_", 2)
    config = base.get_config()
    config.decode.update(policy=policy, gen_length=int(length), cache=cache, batch_size=32)
    config.threshold.value = 0.9
    return config
