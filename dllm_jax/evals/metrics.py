"""From scored samples to the numbers of a table: accuracy with its uncertainty, forwards, tokens per forward."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from dllm_jax.data.tally import Sums, Tally

CONFIDENCE_LEVEL = 0.95
Sample = Mapping[str, Any]  # an output line with task, correct, nfe and num_tokens


def summarize(samples: Iterable[Sample] | Tally) -> dict[str, Any]:
    """Accuracy and cost over all samples and per task.

    Args:
        samples: at least one, or their sums.

    Returns:
        Over all samples: `num_samples`, `accuracy` (micro: the share of samples that are correct), `accuracy_interval`
        (95%, Wilson), `accuracy_macro` (the mean of the tasks' accuracies), `nfe_mean` (forwards per sample) and
        `tokens_per_forward` (all tokens up to the end of text / all forwards). Per task, as mappings from its name: the
        same names with `_by_task`, except `accuracy_macro`; and, for tasks with a stricter reading (`correct_strict`),
        `accuracy_strict_by_task`.
    """
    tally = samples if isinstance(samples, Tally) else Tally(samples)
    tasks = {task: _summarize(own) for task, own in tally.by_task.items()}
    overall = _summarize(tally.total)
    overall["accuracy_macro"] = fmean(own["accuracy"] for own in tasks.values())
    for name in next(iter(tasks.values())):
        overall[f"{name}_by_task"] = {task: own[name] for task, own in tasks.items()}
    strict = {task: sums["strict"] / sums["read_strictly"] for task, sums in tally.by_task.items() if "strict" in sums}
    if strict:
        overall["accuracy_strict_by_task"] = strict
    return overall


def _summarize(sums: Sums) -> dict[str, Any]:
    count, correct = sums["rows"], sums["correct"]
    interval = binomtest(correct, count).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return {
        "num_samples": count,
        "accuracy": correct / count,
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "nfe_mean": sums["nfe"] / count,
        "tokens_per_forward": sums["num_tokens"] / sums["nfe"],
    }
