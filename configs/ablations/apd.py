"""APD between the verifier's choice (R = 0) and the drafts' own (R = 1), without and with a diffusion cache.

`python -m decode.sweep --config=configs/ablations/apd.py` runs them all; R and W as in arXiv 2506.00413.
"""

from ml_collections import ConfigDict

from configs import apd

VARIANTS = {
    f"R{weight}_W{window}": {"mixture_weight": weight, "kv_window": window}
    for window in (0, 32)
    for weight in (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
}


def get_config(variant: str = "R0.7_W32") -> ConfigDict:
    config = apd.get_config()
    config.apd.update(VARIANTS[variant])
    return config
