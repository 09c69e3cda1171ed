"""Commit rules on hand-made confidences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.decoding.policies.base import Policy
from dllm_jax.decoding.policies.confidence import Scheduled, scheduled
from dllm_jax.decoding.policies.threshold import Factor, Threshold
from dllm_jax.decoding.sampling import KeyedNoise
from tests.views import a_prediction, a_view

NOISE = KeyedNoise(jax.random.key(0))


def committed(policy: Policy, confidence: list[float], *, is_open: list[bool] | None = None) -> tuple[list, bool]:
    """Places committed in a single row, and whether it leaves its block."""
    confidence_BQ = jnp.array([confidence])
    open_BQ = jnp.ones(confidence_BQ.shape, bool) if is_open is None else jnp.array([is_open])
    policy_state = () if isinstance(policy, Threshold | Factor) else jnp.zeros(1, jnp.int32)
    commit = policy.commit(policy_state, a_prediction(confidence_BQ), a_view(open_BQ), NOISE)
    return np.flatnonzero(commit.mask_BQ[0]).tolist(), bool(commit.leave_B[0])


def test_threshold_takes_all_at_or_above_and_always_the_best() -> None:
    assert committed(Threshold(value=0.5, decay=0.0), [0.5, 0.4, 0.9]) == ([0, 2], False)
    assert committed(Threshold(value=0.95, decay=0.0), [0.5, 0.4, 0.9]) == ([2], False)
    assert committed(Threshold(value=0.95, decay=0.0), [0.9, 0.4, 0.9]) == ([0], False)  # a tie: the lowest position
    assert committed(Threshold(value=0.95, decay=0.0), [1.0, 0.4, 0.9], is_open=[False, True, False]) == ([1], True)
    assert committed(Threshold(value=0.1, decay=0.0), [0.5, 0.4]) == ([0, 1], True)


@pytest.mark.parametrize(
    ("confidence", "places"),
    [
        ([0.2, 0.1, 0.1, 0.1], [0]),  # the best needs no test
        ([0.2, 0.95, 0.7, 0.1], [1, 2]),  # (2 + 1) * (1 - .7) <= 1, then .2 fails
        ([0.9, 0.95, 0.9, 0.1], [0, 1, 2, 3]),  # only the very last fails: forgiven
        ([0.9, 0.95, 0.9, 0.9], [0, 1, 2, 3]),
        ([0.1], [0]),
        ([0.3, 0.2], [0, 1]),  # the second of two is the very last
        ([0.5, 0.5, 0.5], [0]),  # a tie: the lowest position
    ],
)
def test_factor_takes_the_longest_run_that_passes(confidence: list[float], places: list[int]) -> None:
    assert committed(Factor(value=1.0), confidence)[0] == places


def test_schedules_give_the_remainder_to_the_first_steps() -> None:
    steps = [int(scheduled(jnp.array([10]), jnp.array([i]), jnp.int32(4))[0]) for i in range(4)]
    assert steps == [3, 3, 2, 2]
    assert committed(Scheduled(steps_per_block=jnp.int32(2)), [0.1, 0.3, 0.2, 0.2]) == ([1, 2], False)
