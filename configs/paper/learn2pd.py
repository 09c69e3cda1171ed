"""Learn2PD and EoTP on LLaDA-8B-Instruct, blocks of 32 (arXiv 2509.25188).

filter.path is a filter that `train.filter` makes (docs/paper_rows.md): with two layers, or as many as its name tells.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.paper import llada

SHOTS = {"gsm8k": 5, "math": 4, "humaneval": 0, "mbpp": 3}  # those of lm-evaluation-harness, which the authors run
LEARN2PD = {"decode.policy": "learn2pd", "filter.path": "filter-llada-8b"}
EOTP = LEARN2PD | {"decode.stop": "eot"}
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        f"gsm8k_{length}_{method}": ("gsm8k", length, settings)
        for length in (256, 1024)
        for method, settings in (("llada", {}), ("learn2pd", LEARN2PD), ("eotp", EOTP))
    },
    **{f"gsm8k_1024_{cache}": ("gsm8k", 1024, EOTP | {"decode.cache": cache}) for cache in ("prefix", "dual")},
    **{
        f"{task}_256_{method}": (task, 256, settings)
        for task in ("math", "humaneval", "mbpp")
        for method, settings in (("llada", {}), ("eotp", EOTP))
    },
    **{
        f"gsm8k_256_layers{layers}": ("gsm8k", 256, LEARN2PD | {"filter.path": f"filter-llada-8b-layers{layers}"})
        for layers in (1, 4)
    },
}


def get_config(variant: str = "gsm8k_256_eotp") -> ConfigDict:
    task, length, settings = VARIANTS[variant]
    config = llada.on(task, shots=SHOTS[task])
    config.decode.gen_length = length
    config.learn2pd.threshold = 0.96
    config.update_from_flattened_dict(settings)
    return config
