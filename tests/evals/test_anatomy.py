"""What is read from commit steps, for rows made by hand."""

import pytest

from dllm_jax.evals import anatomy
from tests.evals.sweeps import row

# Three tokens of text in forwards 1, 3, 1, then two behind the end in 2 and 4; forward 5 commits nothing.
ODD = row(0, steps=[1, 3, 1, 2, 4], tokens=3, correct=True) | {"nfe": 5}
ALL_AT_ONCE = row(1, steps=[1, 1, 1, 1, 1], tokens=2, correct=False)


def test_forwards_by_what_they_commit() -> None:
    assert anatomy.forwards_by_kind([ODD]) == {"answer": 2, "behind the end": 2, "nothing": 1}
    assert anatomy.forwards_by_kind([ODD, ALL_AT_ONCE]) == {"answer": 1.5, "behind the end": 1, "nothing": 0.5}


def test_tokens_of_the_answer_by_forward() -> None:
    assert [each.value for each in anatomy.committed_per_forward([ODD, ALL_AT_ONCE])] == [2, 0, 1, 0, 0]


def test_acceptance_by_distance_from_the_first_mask() -> None:
    # Forward 1: distances 0, 1, 2 of ODD (taken: 0 and 2) and 0, 1 of the other; forwards 2 and 3: distance 0.
    found = [each.value for each in anatomy.acceptance([ODD, ALL_AT_ONCE])]
    assert found == pytest.approx([3 / 4, 1 / 2, 1])
    assert anatomy.acceptance([row(0, steps=[1, 1], tokens=0, correct=False)]) == []


def test_calibration() -> None:
    rows = [
        row(
            number, steps=[1, 1], tokens=2, correct=number < 6, confidence=[0.5, 1.0, 0.1] if number > 3 else [1.0, 1.0]
        )
        for number in range(8)
    ]
    found = anatomy.calibration(rows)
    assert found
    assert [(one.score, one.right.value) for one in found.bins] == [(0.5, 1)] * 2 + [(0.5, 0)] * 2 + [(1, 1)] * 4
    assert found.error == 0.25
    assert anatomy.calibration([ODD]) is None  # not traced
    assert (
        anatomy.calibration([row(0, steps=[1], tokens=1, correct=True, confidence=[1.0], finish_reason="error")])
        is None
    )
