"""What refilled slots are worth: forwards of the batch, columns and seconds, by cache, batch size and share.

`python -m decode.sweep --config=configs/ablations/refill.py` runs them all; the metrics have the numbers.
"""

from ml_collections import ConfigDict

from configs import threshold

VARIANTS = [
    f"{cache}_{batch_size}_{share}" for cache in ("none", "dual") for batch_size in (8, 32) for share in (0.0, 0.25)
]


def get_config(variant: str = VARIANTS[0]) -> ConfigDict:
    config = threshold.get_config()
    cache, batch_size, share = variant.split("_")
    config.decode.update(cache=cache, batch_size=int(batch_size), refill=float(share))
    return config
