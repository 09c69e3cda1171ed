"""Intervals, paired tests, Pareto lines and AUP against numbers made by hand."""

import math

import numpy as np
import pytest

from dllm_jax.evals import statistics


def numbers(correct: str, *, tokens: float = 10, forwards: float = 5) -> tuple[np.ndarray, ...]:
    right = np.array([mark == "1" for mark in correct], np.float64)
    return right, np.full(len(right), tokens), np.full(len(right), forwards)


def test_a_paired_comparison() -> None:
    here, there = numbers("1111111100" + "1" * 10, forwards=2.5), numbers("0000000010" + "1" * 10)
    pair = statistics.paired(here, there)
    assert (pair.samples, pair.gained, pair.lost) == (20, 8, 1)
    assert pair.p == pytest.approx(2 * (1 + 9) / 2**9)  # of 9 samples that differ 8 or more to one side
    assert pair.difference.value == pytest.approx(7 / 20)
    assert 0.05 < pair.difference.low < 0.2 < 0.5 < pair.difference.high < 0.65
    assert pair.speedup == pytest.approx((2, 2, 2))


def test_a_variant_against_itself() -> None:
    pair = statistics.paired(numbers("1010"), numbers("1010"))
    assert pair == (4, 0, 0, (0, 0, 0), 1.0, (1, 1, 1))


def test_the_bootstrap_is_that_of_the_normal_distribution_for_many_samples() -> None:
    random = np.random.default_rng(1)
    tokens, forwards = random.poisson(30, 2000).astype(float), random.poisson(10, 2000).astype(float)
    ratio = statistics.ratio(tokens, forwards)
    spread = math.sqrt(np.mean((tokens - ratio.value * forwards) ** 2) / 2000) / forwards.mean()
    assert ratio.value == tokens.sum() / forwards.sum()
    assert ratio.low == pytest.approx(ratio.value - 1.96 * spread, abs=0.15 * spread)
    assert ratio.high == pytest.approx(ratio.value + 1.96 * spread, abs=0.15 * spread)
    columns = statistics.ratios(np.stack([tokens, forwards], 1), np.stack([forwards, forwards], 1))
    assert columns[0] == pytest.approx(ratio, rel=1e-6)
    assert columns[1] == (1, 1, 1)


def test_columns_in_which_only_one_sample_counts() -> None:
    above, below = np.zeros((3, 1)), np.zeros((3, 1))
    above[1], below[1] = 2, 4
    assert statistics.ratios(above, below) == [(0.5, 0.5, 0.5)]


def test_holm_adjusts_from_the_smallest_on() -> None:
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([]) == []


def test_the_pareto_line_has_what_nothing_beats() -> None:
    points = [(1, 0.9), (2, 0.9), (2, 0.8), (3, 0.7), (0.5, 0.95), (3, 0.7), (4, 0.1)]
    assert statistics.pareto(points) == [4, 1, 3, 6]


def test_accuracy_under_parallelism() -> None:
    def aup(*points: tuple[float, float], best: float = 80.0) -> float:
        rho, accuracy = np.array(points).T
        return statistics.aup(rho, accuracy, best=best)

    assert aup((2, 80)) == 160
    weighted = 78 * math.exp(-3 * (1 - 78 / 80))
    assert aup((4, 78), (1, 80)) == pytest.approx(80 + 3 * (80 + weighted) / 2)
    assert aup((1, 80), (4, 78), (8, 74.9)) == aup((1, 80), (4, 78))  # more than five points below the first
    assert aup((1, 0), best=0) == 0
