"""Fast-dLLM on GSM8K, five examples, blocks of 32: Table 1 (arXiv 2505.22618, section 4.1: prefix cache)."""

from typing import Any

from ml_collections import ConfigDict

from configs.paper import llada

COLUMNS: dict[str, dict[str, Any]] = {
    "llada": {},
    "cache": {"decode.cache": "prefix"},
    "parallel": {"decode.policy": "threshold"},
    "both": {"decode.policy": "threshold", "decode.cache": "prefix"},
}
VARIANTS = {
    f"gsm8k_{length}_{column}": settings | {"decode.gen_length": length}
    for length in (256, 512)
    for column, settings in COLUMNS.items()
}


def get_config(variant: str = "gsm8k_256_both") -> ConfigDict:
    config = llada.on("gsm8k", shots=5)
    config.threshold.value = 0.9
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
