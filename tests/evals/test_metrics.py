import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax.evals.metrics import summarize


def sample(task, *, correct=True, nfe=10, num_tokens=20):
    return {"task": task, "correct": correct, "nfe": nfe, "num_tokens": num_tokens}


def test_micro_and_macro_accuracy_differ():
    got = summarize([sample("copy"), sample("copy"), sample("copy"), sample("sort", correct=False)])
    assert got["num_samples"] == 4
    assert got["accuracy"] == 0.75
    assert got["accuracy_macro"] == 0.5
    assert got["accuracy_by_task"] == {"copy": 1.0, "sort": 0.0}
    assert got["num_samples_by_task"] == {"copy": 3, "sort": 1}


def test_tokens_per_forward_is_a_ratio_of_sums():
    got = summarize([sample("copy", nfe=1, num_tokens=9), sample("copy", nfe=9, num_tokens=1)])
    assert got["tokens_per_forward"] == 1.0
    assert got["nfe_mean"] == 5.0
    assert got["tokens_per_forward_by_task"] == {"copy": 1.0}
    assert got["nfe_mean_by_task"] == {"copy": 5.0}


@given(correct=st.integers(0, 60), wrong=st.integers(0, 60))
def test_wilson_interval(correct, wrong):
    n = correct + wrong
    if not n:
        return
    low, high = summarize([sample("copy")] * correct + [sample("copy", correct=False)] * wrong)["accuracy_interval"]
    z, share = 1.959963984540054, correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert low == pytest.approx(max(middle - half, 0), abs=1e-12)
    assert high == pytest.approx(min(middle + half, 1), abs=1e-12)
