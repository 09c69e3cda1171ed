"""APD on 500 problems of GSM8K, Dream-7B and Qwen2.5-0.5B (arXiv 2506.00413, github.com/danielmisrael/apd).

As released: the target is the likeliest token of the mixture, no examples, 256 tokens, temperature 0.2, top-p 0.95.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import apd_dream

VARIANTS: dict[str, dict[str, Any]] = {
    "gsm8k_k1": {
        "verifier.path": "",
        "decode.cache": "none",
        "apd.tokens_per_step": 1,
        "apd.kv_window": 0,
        "apd.max_lookahead": 0,
    },
    "gsm8k_r0.6_w32_m200": {"apd.mixture_weight": 0.6, "apd.kv_window": 32, "apd.max_lookahead": 200},
    "gsm8k_r0.7_w16_m100": {"apd.mixture_weight": 0.7, "apd.kv_window": 16, "apd.max_lookahead": 100},
}


def get_config(variant: str = "gsm8k_r0.7_w16_m100") -> ConfigDict:
    config = apd_dream.get_config()
    config.input.path = "gsm8k_500.jsonl"
    config.eval.shots = 0
    config.decode.batch_size = 1
    config.apd.target = "argmax"
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
