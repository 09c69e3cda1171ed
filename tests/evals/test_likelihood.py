"""LLaDA's `get_log_likelihood.py`, recorded in goldens/F_loglikelihood, and the properties of the random masks."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dllm_jax
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.evals import likelihood
from dllm_jax.mesh import make_mesh
from tests.traces import GOLDENS, MASK, cases


def load(name, **mesh):
    return load_model(GOLDENS / "checkpoints" / name, dtype="float32", mesh=make_mesh(**(mesh or {"data": 1})))


@pytest.fixture(scope="module")
def model():
    return load("llada-tiny")


def losses(model, recorded, *, cfg_scale=0.0):
    return np.stack(
        [
            likelihood.per_sample_loss(
                model,
                perturbed_BL.astype(np.int32),
                p_mask_B=p_mask_B,
                target_L=np.concatenate([recorded["prompt"], recorded["answer"]]),
                prompt_length=len(recorded["prompt"]),
                cfg_scale=cfg_scale,
            )
            for perturbed_BL, p_mask_B in zip(recorded["perturbed"], recorded["p_mask"], strict=True)
        ]
    )


@pytest.mark.parametrize("case", cases("F_loglikelihood"), ids=lambda case: case.name)
def test_reference(case, golden, monkeypatch):
    recorded, args, model = case.arrays, case.args, load(case.checkpoint.name)
    got = losses(model, recorded, cfg_scale=args["cfg_scale"])
    np.testing.assert_allclose(got, recorded["per_sample_loss"], rtol=1e-4)
    np.testing.assert_allclose(got.mean(axis=1), recorded["iteration_loss"], rtol=1e-4)
    draws = iter(zip(recorded["perturbed"].astype(np.int32), recorded["p_mask"], strict=True))
    monkeypatch.setattr(likelihood, "perturb", lambda *args, **kwargs: next(draws))
    value = likelihood.log_likelihood(
        model,
        recorded["prompt"].tolist(),
        recorded["answer"].tolist(),
        seed=0,
        mc_num=args["mc_num"],
        batch_size=args["batch_size"],
        cfg_scale=args["cfg_scale"],
    )
    assert value == pytest.approx(float(recorded["log_likelihood"]), rel=1e-4)
    golden(case)


def test_losses_do_not_depend_on_the_mesh(model):
    recorded = cases("F_loglikelihood")[-1].arrays
    sharded = losses(load("llada-tiny", data=4, tensor=2), recorded)
    np.testing.assert_allclose(sharded, losses(model, recorded), rtol=1e-5)


def test_canvases_longer_than_one_slice_of_logits(model):
    prompt, answer = list(range(40)), list(range(40, 140))
    target_L = np.asarray(prompt + answer)
    perturbed_BL, p_mask_B = likelihood.perturb(
        np.random.default_rng(0), prompt, answer=answer, batch_size=4, mask_id=MASK
    )
    got = likelihood.per_sample_loss(
        model, perturbed_BL, p_mask_B=p_mask_B, target_L=target_L, prompt_length=40, cfg_scale=0.0
    )
    log_p_BLV = jax.nn.log_softmax(dllm_jax.logits(model, perturbed_BL))
    log_p_BL = np.take_along_axis(np.asarray(log_p_BLV), target_L[None, :, None], axis=-1)[..., 0]
    expected = -np.sum(log_p_BL, axis=1, where=perturbed_BL == MASK) / p_mask_B
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@given(seed=st.integers(0, 2**32), length=st.integers(1, 40), batch_size=st.integers(1, 24), prompt=st.integers(0, 5))
def test_masks(seed, length, batch_size, prompt):
    answer = list(range(100, 100 + length))
    tokens_BL, p_mask_B = likelihood.perturb(
        np.random.default_rng(seed), [7] * prompt, answer=answer, batch_size=batch_size, mask_id=MASK
    )
    assert tokens_BL.shape == (batch_size, prompt + length)
    masked_BL = tokens_BL == MASK
    assert not masked_BL[:, :prompt].any()
    expected_BL = np.broadcast_to(np.asarray([7] * prompt + answer), tokens_BL.shape)
    np.testing.assert_array_equal(tokens_BL[~masked_BL], expected_BL[~masked_BL])
    counts_B = masked_BL.sum(axis=1)
    assert counts_B.min() >= 1
    np.testing.assert_allclose(p_mask_B, counts_B / length, rtol=1e-6)
    # Spread: neighbours on the circle 1..A are A / batch_size apart, up to the rounding of both.
    circle = np.sort(counts_B)
    gaps = np.diff(np.append(circle, circle[0] + length))
    assert np.abs(gaps - length / batch_size).max() <= 1


def test_all_first_counts_and_all_positions_are_drawn():
    rng, answer = np.random.default_rng(0), [1, 2, 3, 4]
    draws = [likelihood.perturb(rng, [], answer=answer, batch_size=1, mask_id=MASK) for _ in range(4000)]
    share = np.bincount([int(p_mask_B[0] * 4) for _, p_mask_B in draws], minlength=5) / 4000
    np.testing.assert_allclose(share, [0, 0.25, 0.25, 0.25, 0.25], atol=0.03)
    position_share = np.mean([tokens_BL[0] == MASK for tokens_BL, _ in draws], axis=0)
    np.testing.assert_allclose(position_share, [0.625] * 4, atol=0.03)  # mean of 1/4 .. 4/4


def test_a_likelihood_is_reproducible_and_needs_one_program_per_padded_length(model):
    compiled = likelihood._losses._cache_size()

    def value(prompt, seed):
        return likelihood.log_likelihood(model, prompt, [5, 6, 7], mc_num=6, batch_size=3, cfg_scale=0.0, seed=seed)

    first = value([1, 2], 0)
    assert first == value([1, 2], 0)
    assert first != value([1, 2], 1)
    assert np.isfinite(value([1, 2, 3, 4, 5], 0))
    assert np.isfinite(value([], 0))
    assert likelihood._losses._cache_size() == compiled + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": []}, "answer: expected at least one token, got none"),
        ({"mc_num": 7}, "mc_num: expected a multiple of batch_size 3, got 7"),
        ({"mc_num": 0}, "mc_num: expected a multiple of batch_size 3, got 0"),
        ({"prompt": [1] * 5000}, "prompt . answer: expected at most 4096 tokens, got 5001"),
    ],
)
def test_refusals(model, changes, message):
    arguments = {"prompt": [1], "answer": [2], "mc_num": 6, "batch_size": 3, "cfg_scale": 0.0, "seed": 0} | changes
    with pytest.raises(UsageError, match=message):
        likelihood.log_likelihood(model, **arguments)


def test_other_families_are_refused(model):
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, family="dream"))
    with pytest.raises(UsageError, match=r"model.path: expected a LLaDA model for likelihoods, got a dream model"):
        likelihood.log_likelihood(other, [1], [2], mc_num=1, batch_size=1, cfg_scale=0.0, seed=0)
