"""Points of the curves under which AUP is measured (d3LLM, arXiv 2601.07568): GSM8K, no examples, 256 tokens.

The settings of d3LLM's evaluation scripts; Fast-dLLM's other thresholds are ours, since its curve's are not published.
Every model has a curve of its own, so a sweep of all does not give AUP: see docs/paper_rows.md.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.paper import llada

DPARALLEL = {"model.path": "dParallel-LLaDA-8B-instruct"}
D3LLM = {"model.path": "d3LLM_LLaDA"}
ENTROPY = {"decode.policy": "entropy_threshold", "entropy_threshold.value": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "gsm8k_llada": {},
    **{
        f"gsm8k_fast_dllm_{value}": {
            "decode.policy": "threshold",
            "decode.cache": "dual",
            "threshold.value": value,
        }
        for value in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    },
    "gsm8k_dparallel_one": DPARALLEL,
    "gsm8k_dparallel": DPARALLEL | ENTROPY,
    "gsm8k_d3llm_one": D3LLM,
    "gsm8k_d3llm": D3LLM | ENTROPY | {"decode.blocks": "pipelined"},
}


def get_config(variant: str = "gsm8k_fast_dllm_0.9") -> ConfigDict:
    config = llada.on("gsm8k", shots=0)
    config.decode.gen_length = 256
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
