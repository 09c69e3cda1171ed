"""Forward logits against the reference implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.api import logits
from dllm_jax.checkpoints.load import load_model
from tests.traces import GOLDENS, Case, cases

CASES = {case.name: case for case in cases("A_logits")}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_logits_equal_the_reference(case: Case, golden):
    got = logits(load_model(case.checkpoint), case.arrays["input_ids"])
    np.testing.assert_allclose(got, case.arrays["logits"], rtol=0, atol=1e-3)
    golden(case)


def test_sharded_files_hold_the_same_model():
    tokens = CASES["llada-tiny"].arrays["input_ids"]
    one, sharded = (
        logits(load_model(GOLDENS / "checkpoints" / name), tokens) for name in ("llada-tiny", "llada-tiny-sharded")
    )
    np.testing.assert_array_equal(one, sharded)


def test_padding_on_the_left_changes_nothing():
    model = load_model(GOLDENS / "checkpoints" / "llada-tiny-gqa")
    tokens = CASES["llada-tiny"].arrays["input_ids"]
    padded = np.pad(tokens, ((0, 0), (5, 0)), constant_values=7)
    valid = np.arange(padded.shape[1])[None] >= np.full((len(tokens), 1), 5)
    got = logits(model, padded, valid)[:, 5:]
    np.testing.assert_allclose(got, logits(model, tokens), rtol=0, atol=1e-4)


def test_bfloat16_stays_close():
    case = CASES["llada-tiny"]
    model = load_model(case.checkpoint, dtype="bfloat16")
    got = logits(model, case.arrays["input_ids"])
    assert model.dtype == jnp.bfloat16
    assert got.dtype == np.float32
    agree = np.mean(got.argmax(-1) == case.arrays["logits"].argmax(-1))
    assert agree > 0.8, agree
