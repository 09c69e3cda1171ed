"""Dream's orders: the schedule, the three scores, temperature and top-p; and decoding with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config, validate
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.dream import SCORES, DreamOrder, shares
from dllm_jax.decoding.prediction import Prediction, Sampler, predict
from dllm_jax.decoding.sampling import KeyedNoise, nucleus
from dllm_jax.errors import UsageError
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import DREAM_ORDERS, DecodeSettings
from tests.traces import GOLDENS
from tests.views import a_view

DREAM = GOLDENS / "checkpoints" / "dream-tiny"
NOISE = KeyedNoise(jax.random.key(0))
PROBABILITY = jnp.array([[[0.5, 0.3, 0.15, 0.05], [0.48, 0.48, 0.02, 0.02], [0.97, 0.01, 0.01, 0.01]]])
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=7 + 4 * seed).tolist() for seed in range(3)]


def prediction(probability_BQV: jax.Array = PROBABILITY, gumbel: jax.Array | None = None, **settings) -> Prediction:
    decode = DecodeSettings(**{"policy": "entropy"} | settings)
    sampler = Sampler.from_settings(decode, PRESETS["llada_tiny"], end_ids=())
    return predict(jnp.log(probability_BQV), sampler, gumbel_BQV=gumbel)


def scores(predicted: Prediction) -> dict[str, np.ndarray]:
    return {name: np.asarray(score(predicted)[0]) for name, score in SCORES.items()}


def test_scores_are_probability_margin_and_negative_entropy() -> None:
    got = scores(prediction())
    np.testing.assert_allclose(got["maskgit_plus"], [0.5, 0.48, 0.97], rtol=1e-5)
    np.testing.assert_allclose(got["topk_margin"], [0.2, 0, 0.96], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["entropy"], np.sum(PROBABILITY[0] * np.log(PROBABILITY[0]), axis=-1), rtol=1e-5)
    assert [int(score.argsort()[0]) for score in got.values()] == [1, 1, 0]  # the orders differ
    assert set(SCORES) == set(DREAM_ORDERS)


def test_scores_are_of_the_distribution_drawn_from() -> None:
    push_second = jnp.zeros(PROBABILITY.shape).at[..., 1].set(50.0)
    got = prediction(gumbel=push_second, temperature=0.5)
    np.testing.assert_array_equal(got.token_BQ, [[1, 1, 1]])
    squared = np.asarray(PROBABILITY[0] ** 2 / jnp.sum(PROBABILITY[0] ** 2, axis=-1, keepdims=True))
    np.testing.assert_allclose(scores(got)["maskgit_plus"], squared[:, 1], rtol=1e-4)
    np.testing.assert_allclose(scores(got)["topk_margin"], squared[:, 0] - squared[:, 1], rtol=1e-4, atol=1e-6)
    cut = prediction(top_p=0.6)  # 2, 2 and 1 tokens stay
    np.testing.assert_allclose(scores(cut)["maskgit_plus"], [0.5 / 0.8, 0.5, 1], rtol=1e-5)
    np.testing.assert_allclose(scores(cut)["topk_margin"], [0.2 / 0.8, 0, 1], rtol=1e-5, atol=1e-6)
    assert scores(cut)["entropy"][2] == pytest.approx(0, abs=1e-6)


def test_top_p_never_draws_what_it_cut() -> None:
    push_last = jnp.zeros(PROBABILITY.shape).at[..., 3].set(50.0)  # 2 is the mask here
    for policy in ("entropy", "threshold"):
        assert (prediction(gumbel=push_last, temperature=1.0, policy=policy).token_BQ == 3).all()
        cut = prediction(gumbel=push_last, temperature=1.0, top_p=0.6, policy=policy)
        np.testing.assert_array_equal(cut.token_BQ, [[0, 0, 0]])
    np.testing.assert_allclose(cut.confidence_BQ, [[0.5, 0.48, 0.97]], rtol=1e-5)  # LLaDA's rule: the bare softmax


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999])
def test_the_nucleus_is_the_one_found_by_sorting(top_p: float, scale: float) -> None:
    logits = np.random.default_rng(3).normal(0, scale, size=(4, 3, 200)).astype(np.float32)
    descending = np.argsort(-logits, axis=-1)
    probability = np.take_along_axis(np.asarray(jax.nn.softmax(logits, axis=-1), np.float64), descending, axis=-1)
    before = np.cumsum(probability, axis=-1) - probability
    expected = np.zeros(logits.shape, bool)
    np.put_along_axis(expected, descending, before <= top_p, axis=-1)
    np.testing.assert_array_equal(nucleus(jnp.asarray(logits), jnp.float32(top_p)), expected)


def test_the_nucleus_keeps_equals_together_and_no_forbidden_token() -> None:
    kept = nucleus(jnp.array([[[2.0, 2.0, 0.0, -jnp.inf]]]), jnp.float32(0.3))
    np.testing.assert_array_equal(kept, [[[True, True, False, False]]])
    kept = nucleus(jnp.array([[[2.0, 2.0, 0.0, -jnp.inf]]]), jnp.float32(0.9999999))
    np.testing.assert_array_equal(kept, [[[True, True, True, False]]])


def test_shares_of_evenly_falling_times() -> None:
    share = shares(4, eps=0.2)
    assert share.dtype == np.float32
    np.testing.assert_allclose(share, [0.2, 0.25, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_array_equal(shares(1, eps=1e-3), [1])


def committed(step: int, steps: int, *, is_open: list[bool]) -> tuple[list[int], bool]:
    """Places committed in the given step, and whether the row leaves."""
    policy = DreamOrder(share_S=jnp.asarray(shares(steps, eps=1e-3)), score=SCORES["maskgit_plus"])
    step_B, open_BQ = jnp.array([step]), jnp.array([is_open])
    commit = policy.commit((), prediction(), a_view(open_BQ, nfe_B=step_B, block_nfe_B=step_B), NOISE)
    return np.flatnonzero(commit.mask_BQ[0]).tolist(), bool(commit.leave_B[0])


def test_commits_round_down_and_the_last_step_takes_all() -> None:
    assert committed(0, 3, is_open=[True] * 3) == ([], False)  # 3 * .333 = .999
    assert committed(1, 3, is_open=[True] * 3) == ([2], False)
    assert committed(2, 3, is_open=[True, True, False]) == ([0, 1], True)
    assert committed(2, 3, is_open=[False] * 3) == ([], True)


@pytest.mark.parametrize("steps", [0, 5, 40])
def test_every_row_takes_all_steps_and_its_own_result(steps: int) -> None:
    settings = DecodeSettings(policy="entropy", gen_length=16, block_length=3, steps=steps, temperature=0.3, top_p=0.9)
    decoder = Decoder(load_model(DREAM), Config(decode=settings))
    together = decoder(PROMPTS)
    np.testing.assert_array_equal(together.nfe_B, steps or 16)
    assert together.commit_step_BG.max() == together.iterations == (steps or 16)
    assert together.commit_step_BG.min() > 0
    assert 310 not in together.tokens_BG
    alone = decoder(PROMPTS[1:2], rows=[1])
    np.testing.assert_array_equal(alone.tokens_BG[0], together.tokens_BG[1])
    np.testing.assert_array_equal(alone.commit_step_BG[0], together.commit_step_BG[1])


def test_a_sweep_over_numbers_compiles_once() -> None:
    model, timings = load_model(DREAM), []
    for eps, top_p, temperature in ((1e-3, 0.9, 0.2), (1e-2, 0.8, 0.5)):
        settings = DecodeSettings(policy="topk_margin", gen_length=16, eps=eps, top_p=top_p, temperature=temperature)
        timings.append(Decoder(model, Config(decode=settings))(PROMPTS).timing)
    assert timings[1].compilations == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eps": 0.0}, "decode.eps: expected above 0 and below 1, got 0.0"),
        ({"eps": 1.0}, "decode.eps: expected above 0 and below 1, got 1.0"),
        ({"top_p": 0.0}, "decode.top_p: expected above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "decode.top_p: expected above 0 and at most 1, got 1.5"),
        ({"confidence_eos_eot_inf": True}, "decode.confidence_eos_eot_inf: expected False with decode.policy entropy"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        validate(Config(decode=DecodeSettings(policy="entropy", **settings)))
