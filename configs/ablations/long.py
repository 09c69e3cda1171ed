"""What the papers measured on long canvases: EoTP at 512 and 1,024 tokens, DiCo on 256 in one block.

`python -m decode.sweep --config=ablations/long --config.output.path=FOLDER` runs them all, on 20 samples of each
bundled task (all 500 with `--config.eval.full=true`). At 1,024 tokens there is room for prompts of 128.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, dico, learn2pd

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"{policy}_{length}_{stop}": (
            learn2pd if policy == "learn2pd" else base,
            {"decode.policy": policy, "decode.gen_length": length, "decode.stop": stop},
        )
        for length in (512, 1024)
        for policy in ("threshold", "learn2pd")
        for stop in ("none", "eot")
    },
    "threshold_256_block_32": (base, {"decode.policy": "threshold", "decode.gen_length": 256, "threshold.value": 0.95}),
    "dico_256_block_256": (dico, {"decode.gen_length": 256, "decode.block_length": 256}),
    "dico_256_block_128": (dico, {"decode.gen_length": 256, "decode.block_length": 128, "dico.num_seeds": 4}),
}


def get_config(variant: str = "threshold_512_eot") -> ConfigDict:
    experiment, settings = VARIANTS[variant]
    config = experiment.get_config()
    config.update_from_flattened_dict(settings)
    return config
