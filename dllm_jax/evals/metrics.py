"""From scored samples to the numbers of a table: accuracy with its uncertainty, forwards, tokens per forward."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

CONFIDENCE_LEVEL = 0.95
Sample = Mapping[str, Any]  # an output line with task, correct, nfe and num_tokens


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Accuracy and cost over all samples and per task.

    Args:
        samples: at least one.

    Returns:
        Over all samples: `num_samples`, `accuracy` (micro: the share of samples that are correct), `accuracy_interval`
        (95%, Wilson), `accuracy_macro` (the mean of the tasks' accuracies), `nfe_mean` (forwards per sample) and
        `tokens_per_forward` (all tokens up to the end of text / all forwards). Per task, as mappings from its name: the
        same names with `_by_task`, except `accuracy_macro`; and, for tasks with a stricter reading (`correct_strict`),
        `accuracy_strict_by_task`.
    """
    by_task = defaultdict(list)
    for sample in samples:
        by_task[sample["task"]].append(sample)
    tasks = {task: _summarize(own) for task, own in by_task.items()}
    overall = _summarize(samples)
    overall["accuracy_macro"] = fmean(own["accuracy"] for own in tasks.values())
    for name in next(iter(tasks.values())):
        overall[f"{name}_by_task"] = {task: own[name] for task, own in tasks.items()}
    strict = {
        task: [sample["correct_strict"] for sample in own if "correct_strict" in sample]
        for task, own in by_task.items()
    }
    if any(strict.values()):
        overall["accuracy_strict_by_task"] = {task: fmean(readings) for task, readings in strict.items() if readings}
    return overall


def _summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    correct, forwards = sum(sample["correct"] for sample in samples), sum(sample["nfe"] for sample in samples)
    interval = binomtest(correct, len(samples)).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return {
        "num_samples": len(samples),
        "accuracy": correct / len(samples),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "nfe_mean": forwards / len(samples),
        "tokens_per_forward": sum(sample["num_tokens"] for sample in samples) / forwards,
    }
