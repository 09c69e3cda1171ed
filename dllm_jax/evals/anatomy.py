"""What a decoding does inside, from its output lines: when tokens are committed, where, and how sure they were."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dllm_jax.data.rows import Row
from dllm_jax.evals.statistics import Estimate, ratios, wilson

KINDS = ("answer", "behind the end", "nothing")  # what a forward commits
BINS = 8


class Bin(NamedTuple):
    """Answers of about the same score."""

    score: float  # the mean
    right: Estimate  # the share of correct answers
    answers: int


class Calibration(NamedTuple):
    """Scores against correctness."""

    bins: list[Bin]
    error: float  # expected: the mean distance of score and share, weighted by answers


def _steps(row: Row) -> np.ndarray:
    """The forward in which each token of the answer was committed, [N]; 0: in none."""
    return np.array(row["commit_step"][: row["num_tokens"]], np.int64)


def committed_per_forward(rows: Sequence[Row]) -> list[Estimate]:
    """Tokens of the answer that the n-th forward commits, the mean over the rows that have so many forwards."""
    most = max(row["nfe"] for row in rows)
    counts_SN = np.stack([np.bincount(_steps(row), minlength=most + 1)[1 : most + 1] for row in rows])
    alive_SN = np.stack([np.arange(1, most + 1) <= row["nfe"] for row in rows])
    return ratios(counts_SN.astype(np.float64), alive_SN.astype(np.float64))


def acceptance(rows: Sequence[Row]) -> list[Estimate]:
    """How often a masked token of the answer is committed in a forward, by its distance from the first masked one.

    Args:
        rows: output lines.

    Returns:
        The shares for the distances 0, 1, 2, ... up to the first at which no mask was seen.
    """
    longest = max(row["num_tokens"] for row in rows)
    taken_SN, seen_SN = np.zeros((2, len(rows), longest))
    for row, taken_N, seen_N in zip(rows, taken_SN, seen_SN, strict=True):
        steps_N = _steps(row)
        for step in range(1, row["nfe"] + 1):
            (masked,) = np.nonzero(steps_N >= step)
            if not len(masked):
                break
            distance = masked - masked[0]
            seen_N[distance] += 1
            taken_N[distance[steps_N[masked] == step]] += 1
    (never,) = np.nonzero(seen_SN.sum(0) == 0)
    last = never[0] if len(never) else longest
    return ratios(taken_SN[:, :last], seen_SN[:, :last]) if last else []


def forwards_by_kind(rows: Sequence[Row]) -> dict[str, float]:
    """Forwards per sample that commit some of the answer, only what is behind its end, or nothing."""
    answer = behind = 0
    for row in rows:
        steps = np.array(row["commit_step"], np.int64)
        inside = set(steps[: row["num_tokens"]][steps[: row["num_tokens"]] > 0].tolist())
        answer += len(inside)
        behind += len(set(steps[steps > 0].tolist()) - inside)
    total = sum(row["nfe"] for row in rows)
    return dict(zip(KINDS, (n / len(rows) for n in (answer, behind, total - answer - behind)), strict=True))


def calibration(rows: Sequence[Row]) -> Calibration | None:
    """The probability that the model gives its answer, as if its tokens were independent, against correctness.

    Args:
        rows: output lines; only those with `confidence` (output.trace), at least one token and no error count.

    Returns:
        The score is the product of the confidences with which the tokens of an answer were committed. Bins hold the
        same number of answers each; None: no line has confidences.
    """
    traced = [r for r in rows if r.get("confidence") and r["num_tokens"] and r["finish_reason"] != "error"]
    if not traced:
        return None
    scores = np.array([np.prod(row["confidence"][: row["num_tokens"]]) for row in traced])
    correct = np.array([row["correct"] for row in traced], np.int64)
    order = np.argsort(scores, kind="stable")
    bins = [
        Bin(float(scores[some].mean()), wilson(int(correct[some].sum()), len(some)), len(some))
        for some in np.array_split(order, min(BINS, len(order)))
    ]
    error = sum(each.answers * abs(each.score - each.right.value) for each in bins) / len(traced)
    return Calibration(bins, float(error))
