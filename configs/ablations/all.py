"""Every method of the package on the bundled model, with some settings each: what parallelism costs, side by side.

`python -m decode.sweep --config=ablations/all --config.output.path=FOLDER` runs them all, on 20 samples of each
bundled task (all 500 with `--config.eval.full=true`); `python -m decode.report FOLDER` puts them into a report.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import apd, base, dico, dico_semi_ar, learn2pd

NUMBERS: dict[str, tuple[Any, ...]] = {  # of methods without a cache, in aligned blocks, to the last block
    "threshold.value": (0.5, 0.7, 0.8, 0.9, 0.95),
    "factor.value": (0.25, 0.5, 1.0),
    "frechet.delta": (0.1, 0.25, 0.5),
    "eb.gamma": (0.01, 0.1, 0.5),
    "entropy_threshold.value": (0.1, 0.5, 1.0),
    "klass.confidence": (0.6, 0.9),
    "local_leap.relaxed": (0.6, 0.75),
    "hierarchy.low": (0.4, 0.7),
    "credit.threshold": (0.7, 0.9),
    "r2.threshold": (0.8, 0.9),
    "wino.threshold": (0.6, 0.8),
    "clad.threshold": (0.7, 0.9),
    "dawn.threshold": (0.8, 0.9),
    "dynamic.threshold": (0.8, 0.9),
    "edit.threshold": (0.8, 0.9),
}
THRESHOLD: dict[str, dict[str, Any]] = {  # other blocks, caches and stop rules with the plain threshold
    "decay": {"threshold.decay": 0.4},
    "prefix": {"decode.cache": "prefix"},
    "dual": {"decode.cache": "dual"},
    "sliding": {"decode.blocks": "sliding"},
    "growing": {"decode.blocks": "growing"},
    "sliding_cache": {"decode.blocks": "sliding", "decode.cache": "sliding"},
    "adaptive": {"decode.blocks": "adaptive", "adaptive.delimiters": "17,19"},
    "eot": {"decode.stop": "eot"},
    "settled": {"decode.stop": "settled"},
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "low_confidence_96": (base, {"decode.policy": "low_confidence"}),
    **{
        f"{policy}_24": (base, {"decode.policy": policy, "decode.steps": 24})
        for policy in ("low_confidence", "random", "entropy", "maskgit_plus", "topk_margin", "sequential")
    },
    **{
        f"{policy}_{number}": (base, {"decode.policy": policy, f"{policy}.{field}": number})
        for policy, field, numbers in ((*name.split("."), numbers) for name, numbers in NUMBERS.items())
        for number in numbers
    },
    **{f"threshold_{name}": (base, {"decode.policy": "threshold"} | more) for name, more in THRESHOLD.items()},
    "pipelined": (base, {"decode.policy": "entropy_threshold", "decode.blocks": "pipelined"}),
    "learn2pd": (learn2pd, {"decode.stop": "none"}),
    "learn2pd_eot": (learn2pd, {}),
    "dico": (dico, {}),
    "dico_semi_ar": (dico_semi_ar, {}),
    "dico_eot": (dico, {"decode.stop": "eot"}),
    **{
        f"apd_R{weight}_W{window}": (apd, {"apd.mixture_weight": weight, "apd.kv_window": window})
        for window, weights in ((0, (0.0, 0.7)), (32, (0.0, 0.7, 0.85, 1.0)))
        for weight in weights
    },
}


def get_config(variant: str = "threshold_0.9") -> ConfigDict:
    experiment, settings = VARIANTS[variant]
    config = experiment.get_config()
    config.output.trace = True  # confidences, for the report
    config.update_from_flattened_dict(settings)
    return config
