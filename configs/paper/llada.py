"""LLaDA-8B-Instruct's own sampler on GSM8K (arXiv 2502.09992, and EVAL.md of github.com/ML-GSAI/LLaDA).

docs/paper_rows.md has the published figures of this and the other files of this folder. `on` is what they start from.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import vanilla

FILES = {
    "gsm8k": "gsm8k_test.jsonl",
    "math": "math_test.jsonl",
    "humaneval": "HumanEval.jsonl.gz",
    "mbpp": "mbpp_test.jsonl",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gsm8k_pure": {"gen_length": 512, "block_length": 512, "confidence_eos_eot_inf": True},
    "gsm8k_block8": {"gen_length": 256, "block_length": 8},
}


def on(task: str, *, shots: int) -> ConfigDict:
    """LLaDA-8B-Instruct, a token per forward, one prompt at a time, on a task as the papers ask it.

    HumanEval is a text to go on with, as in their evaluations; the others are chats.
    """
    config = vanilla.get_config()
    config.model.path = "LLaDA-8B-Instruct"
    config.input.path = FILES[task]
    config.eval.shots = shots
    config.decode.batch_size = 1
    if task == "humaneval":
        config.tokenizer.chat_template = "off"
    return config


def get_config(variant: str = "gsm8k_block8") -> ConfigDict:
    config = on("gsm8k", shots=4)
    config.decode.update(VARIANTS[variant])
    return config
