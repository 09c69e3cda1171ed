"""DiCo on LLaDA-8B-Instruct, 256 tokens: beside one token per forward and Fast-dLLM, and ablated (arXiv 2602.23792).

Without blocks (b256) eight seeds, with two blocks (b128) four; no cache. Examples as in github.com/JustTheice/DiCo.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.paper import llada

SHOTS = {"gsm8k": 4, "humaneval": 0}
SEEDS = {256: 8, 128: 4}
DICO = {"decode.policy": "dico"}
METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "fast_dllm": {"decode.policy": "threshold", "threshold.value": 0.95},
    "dico": DICO,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no_trajectory": {"dico.weighting": "none"},
    "finalize_confidence": {"dico.margin": 1e9},
    **{f"n{seeds}": {"dico.num_seeds": seeds} for seeds in (1, 2, 3, 4, 5, 6, 7, 9, 10)},
}
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        f"{task}_b{block}_{method}": (task, block, settings)
        for task, block in (("gsm8k", 256), ("humaneval", 256), ("gsm8k", 128))
        for method, settings in METHODS.items()
    },
    **{f"gsm8k_b256_{name}": ("gsm8k", 256, DICO | settings) for name, settings in ABLATIONS.items()},
}


def get_config(variant: str = "gsm8k_b256_dico") -> ConfigDict:
    task, block, settings = VARIANTS[variant]
    config = llada.on(task, shots=SHOTS[task])
    config.decode.gen_length = 256
    config.decode.block_length = block
    config.dico.num_seeds = SEEDS[block]
    config.update_from_flattened_dict(settings)
    return config
