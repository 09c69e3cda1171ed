"""What a reviewer asks of a comparison: intervals, paired tests, the Pareto line, accuracy under parallelism.

All intervals are of 95% and over samples: Wilson's for shares, percentiles of a bootstrap for everything else. The
same resamples serve all variants of the same samples, so what is compared is paired.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from dllm_jax.evals.metrics import CONFIDENCE_LEVEL

RESAMPLES, SEED = 4000, 0
AUP_DROP = 5.0  # percent below the first point of a curve that still count
AUP_STEEPNESS = 3.0
TAILS = (50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL))  # percentiles

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """One variant against another on the samples of both.

    Attributes:
        samples: that both have.
        gained: right here, wrong there.
        lost: wrong here, right there.
        difference: of accuracy, with a paired bootstrap interval.
        p: McNemar's, exact: of so uneven a split, or a more uneven one, of the samples that differ, if a sample that
            differs were as likely to be gained as lost.
        speedup: tokens per forward here / there, with a paired bootstrap interval.
    """

    samples: int
    gained: int
    lost: int
    difference: Estimate
    p: float
    speedup: Estimate


@functools.lru_cache(maxsize=4)
def resamples(count: int) -> np.ndarray:
    """How often each of `count` samples is drawn, [RESAMPLES, count]; every row sums to `count`."""
    return np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float32)


def wilson(correct: float, count: int) -> Estimate:
    """A share with its interval."""
    interval = binomtest(round(correct), count).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return Estimate(correct / count, float(interval.low), float(interval.high))


def bootstrap(value: float, drawn: np.ndarray) -> Estimate:
    """A number with the percentiles of what it was in the resamples."""
    low, high = np.percentile(drawn, TAILS)
    return Estimate(value, float(low), float(high))


def ratio(above_S: np.ndarray, below_S: np.ndarray) -> Estimate:
    """The sum of one number of the samples over that of another."""
    drawn = resamples(len(above_S))
    return bootstrap(above_S.sum() / below_S.sum(), (drawn @ above_S) / (drawn @ below_S))


def ratios(above_SN: np.ndarray, below_SN: np.ndarray) -> list[Estimate]:
    """`ratio` of every column, in which some samples of the second are not 0; of resamples those count in which."""
    drawn, count = resamples(len(above_SN)), above_SN.shape[1]
    above_RN, below_RN = drawn @ above_SN, drawn @ below_SN
    shares_RN = np.divide(above_RN, below_RN, where=below_RN > 0, out=np.full_like(above_RN, np.nan))
    low_N, high_N = np.nanpercentile(shares_RN, TAILS, axis=0)
    value_N = above_SN.sum(0) / below_SN.sum(0)
    return [Estimate(float(value_N[i]), float(low_N[i]), float(high_N[i])) for i in range(count)]


def paired(here: tuple[np.ndarray, np.ndarray, np.ndarray], there: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Paired:
    """Compares two variants on the same samples.

    Args:
        here: of every sample whether it is correct, its tokens and its forwards: [S] each.
        there: the same of the other variant, in the same order.
    """
    (right, tokens, forwards), (other_right, other_tokens, other_forwards) = here, there
    count = len(right)
    gained, lost = int(((right > 0) & (other_right == 0)).sum()), int(((right == 0) & (other_right > 0)).sum())
    drawn = resamples(count)
    difference = bootstrap(float((right - other_right).mean()), drawn @ (right - other_right) / count)
    speed = (drawn @ tokens) / (drawn @ forwards) * (drawn @ other_forwards) / (drawn @ other_tokens)
    value = tokens.sum() / forwards.sum() * other_forwards.sum() / other_tokens.sum()
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(count, gained, lost, difference, p, bootstrap(float(value), speed))


def holm(ps: Sequence[float]) -> list[float]:
    """P values of several tests, adjusted so that all of them together err as often as one (Holm 1979)."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate([(len(ps) - i) * ps[k] for i, k in enumerate(order)])
    return [float(p) for p in np.minimum(adjusted, 1)]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats in one number and equals in the other, from the slowest to the fastest.

    Args:
        points: (tokens per forward, accuracy).
    """
    best, line = -np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            line.append(i)
    return line[::-1]


def aup(rho: np.ndarray, accuracy: np.ndarray, *, best: float) -> float:
    """Accuracy under parallelism of one method (d3LLM): the area below its curve, where accuracy holds.

    Args:
        rho: tokens per forward of its settings.
        accuracy: of each, in percent.
        best: accuracy of the best method, in percent.
    """
    order = np.lexsort((-accuracy, rho))
    rho, accuracy = rho[order], accuracy[order]
    kept = accuracy >= accuracy[0] - AUP_DROP
    rho, accuracy = rho[kept], accuracy[kept]
    weighted = accuracy * np.minimum(np.exp(-AUP_STEEPNESS * (1 - accuracy / best)), 1) if best else accuracy
    return float(rho[0] * accuracy[0] + 0.5 * np.sum(np.diff(rho) * (weighted[1:] + weighted[:-1])))
