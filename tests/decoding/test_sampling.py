"""Rankings, draws and predictions on hand-made numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.decoding.prediction import Sampler, drawn_from, guide, paired, predict
from dllm_jax.decoding.sampling import KeyedNoise, rank, top_n
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import DecodeSettings

TINY = PRESETS["llada_tiny"]  # EoS 0, end of turn 5


def sampler(**settings: object) -> Sampler:
    return Sampler.from_settings(DecodeSettings(**settings), TINY, end_ids=TINY.end_ids)


def test_ties_go_to_the_lowest_position_and_closed_slots_come_last() -> None:
    score = jnp.array([[0.5, 0.9, 0.9, 0.5, 1.0]])
    is_open = jnp.array([[True, True, True, True, False]])
    np.testing.assert_array_equal(rank(score, is_open), [[2, 0, 1, 3, 4]])
    np.testing.assert_array_equal(top_n(score, is_open, jnp.array([3])), [[True, True, True, False, False]])
    np.testing.assert_array_equal(top_n(score, is_open, jnp.array([9])), is_open)


def test_a_slot_of_confidence_zero_still_ranks_before_closed_ones() -> None:
    np.testing.assert_array_equal(rank(jnp.zeros((1, 3)), jnp.array([[False, True, True]])), [[2, 0, 1]])


def test_draws_follow_the_counters_not_the_slot() -> None:
    noise = KeyedNoise(jax.random.key(0))
    row, nfe = jnp.array([4, 9]), jnp.array([2, 0])
    whole = noise.gumbel(row, nfe, jnp.array([[0, 1, 2], [5, 6, 7]]), vocab_size=11)
    part = noise.gumbel(row[1:], nfe[1:], jnp.array([[7, 5]]), vocab_size=11)
    np.testing.assert_array_equal(part[0], whole[1, [2, 0]])
    assert len(np.unique(whole)) == whole.size
    assert noise.uniform(row, nfe, jnp.zeros((2, 3), int)).shape == (2, 3)


def test_prediction_is_softmax_confidence_and_top_two_margin() -> None:
    logits = jnp.log(jnp.array([[[0.1, 0.6, 0.3]]]))
    prediction = predict(logits, sampler(), gumbel_BQV=None)
    assert prediction.token_BQ == 1
    np.testing.assert_allclose(prediction.confidence_BQ, 0.6, rtol=1e-6)
    np.testing.assert_allclose(prediction.margin_BQ, np.log(2), rtol=1e-5)


@pytest.mark.parametrize(("affects", "confidence"), [(True, 0.1), (False, 0.6)])
def test_order_by_the_drawn_or_by_the_likeliest_token(affects: bool, confidence: float) -> None:
    logits = jnp.log(jnp.array([[[0.1, 0.6, 0.3]]]))
    push_first = jnp.array([[[50.0, 0.0, 0.0]]])
    drawn = predict(logits, sampler(temperature=1.0, temperature_affects_order=affects), gumbel_BQV=push_first)
    assert drawn.token_BQ == 0
    np.testing.assert_allclose(drawn.confidence_BQ, confidence, rtol=1e-5)


def test_suppression_of_the_ends() -> None:
    logits = jnp.zeros((1, 1, TINY.vocab_size)).at[0, 0, TINY.eos_id].set(9.0)
    assert predict(logits, sampler(logits_eos_inf=True), gumbel_BQV=None).token_BQ != TINY.eos_id
    last = predict(logits, sampler(confidence_eos_eot_inf=True), gumbel_BQV=None)
    assert last.token_BQ == TINY.eos_id
    assert last.confidence_BQ == 0
    assert sampler(confidence_eos_eot_inf=True, temperature=0.5).last_ids == TINY.end_ids == (0, 5)
    reference = sampler(confidence_eos_eot_inf=True, temperature=0.5, compat="reference")
    assert reference.last_ids == (5,)


def test_gumbel_draws_follow_the_softmax() -> None:
    probability = jnp.array([0.5, 0.3, 0.2])
    count = 20_000
    noise = KeyedNoise(jax.random.key(1)).gumbel(
        jnp.arange(count), jnp.zeros(count, int), jnp.zeros((count, 1), int), vocab_size=3
    )
    logits = jnp.broadcast_to(jnp.log(probability), noise.shape)
    without_mask = dataclasses.replace(sampler(temperature=1.0), mask_id=None)
    token = predict(logits, without_mask, gumbel_BQV=noise).token_BQ
    share = np.bincount(np.asarray(token).ravel(), minlength=3) / count
    np.testing.assert_allclose(share, probability, atol=4 * np.sqrt(0.25 / count))


def test_guidance_extrapolates_from_the_promptless_row_of_a_pair() -> None:
    with_prompt, without = jnp.array([3.0, 7.0])[:, None, None], jnp.array([1.0, 6.0])[:, None, None]
    guided = guide(paired(with_prompt, without), sampler(cfg_scale=0.5).cfg_scale)
    np.testing.assert_allclose(guided[:, 0, 0], [1 + 1.5 * 2, 6 + 1.5 * 1], rtol=1e-6)


def test_top_k_keeps_the_likeliest_and_their_equals() -> None:
    logits = jnp.array([[[1.0, 4.0, 3.0, 3.0, 0.0]]])
    for top_k, kept in ((0, 5), (1, 1), (2, 3), (3, 3), (4, 4), (5, 5)):
        drawn = drawn_from(logits, sampler(top_k=top_k))
        assert int(jnp.isfinite(drawn).sum()) == kept, top_k
    everything = sampler(top_k=10_000)
    assert everything.top_k == TINY.vocab_size


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (3, 0.6), (40, 0.9), (0, 0.7), (1, 0.5)])
def test_top_k_and_then_top_p_against_numpy(top_k: int, top_p: float) -> None:
    """The nucleus is one of what top-k leaves; the confidence of a model of blocks is of what is left of both."""
    temperature, vocab = 0.7, TINY.vocab_size
    draw = np.random.default_rng(2)
    logits_QV, gumbel_QV = draw.normal(0, 3, (6, vocab)), draw.gumbel(size=(6, vocab))
    logits_QV[:, TINY.mask_id] = -20.0
    wanted, confidence = [], []
    for logits_V, gumbel_V in zip(logits_QV, gumbel_QV, strict=True):
        kept = np.argsort(-logits_V)[: top_k or vocab]
        share = np.exp(logits_V[kept] / temperature)
        share /= share.sum()
        before = np.cumsum(share) - share  # of all likelier ones
        kept = kept[before <= top_p]
        share = np.exp(logits_V[kept] / temperature)
        place = (logits_V[kept] / temperature + gumbel_V[kept]).argmax()
        wanted.append(kept[place])
        confidence.append(share[place] / share.sum())
    settings = DecodeSettings(top_k=top_k, top_p=top_p, temperature=temperature)
    in_blocks = dataclasses.replace(TINY, block_causal=True, causal_block=8)
    ours = Sampler.from_settings(settings, in_blocks, end_ids=TINY.end_ids)
    logits, gumbel = jnp.asarray(logits_QV, jnp.float32)[None], jnp.asarray(gumbel_QV, jnp.float32)[None]
    prediction = predict(logits, ours, gumbel_BQV=gumbel)
    np.testing.assert_array_equal(prediction.token_BQ[0], wanted)
    np.testing.assert_allclose(prediction.confidence_BQ[0], confidence, rtol=1e-4)
