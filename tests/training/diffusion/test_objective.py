"""Masks and loss by their definition: what is masked, how often, what counts, and where gradients go."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from dllm_jax.data.canvases import Canvases
from dllm_jax.models.transformer import Transformer
from dllm_jax.training.diffusion.config import ObjectiveSettings
from dllm_jax.training.diffusion.objective import MaskedTokens, Noised
from tests.training.tiny import SHAPE

MASK, EOS, LENGTH = 63, 0, 12
DIFFUSION = dataclasses.replace(SHAPE, causal_block=0, mask_id=MASK)


def canvases(rows: int, *, prompt: int = 3, answer: int = 5, end: int = 10) -> Canvases:
    """Rows of prompt, answer and EoS up to `end`, behind which nothing is attended; LENGTH columns."""
    column = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
    inside, noised = column < end, (column >= prompt) & (column < end)
    return Canvases(
        tokens_BL=np.where(column < prompt + answer, 10 + column, EOS).astype(np.int32),
        noised_BL=noised,
        padding_BL=noised & (column >= prompt + answer),
        positions_BL=np.where(inside, column, 0).astype(np.int32),
        segments_BL=inside.astype(np.int32),
        order_BL=np.zeros((rows, LENGTH), np.int32),
    )


def prepared(batch: Canvases, key: int = 0, **settings: Any) -> Noised:
    return MaskedTokens(ObjectiveSettings(**settings), MASK).prepare(batch, jax.random.key(key))


def masked(noised: Noised) -> np.ndarray:
    return np.asarray(noised.tokens_BL == MASK)


class Table:
    """A model whose logits are its parameters."""

    config = types.SimpleNamespace(vocab_size=4, logit_shift=0)

    def __init__(self, logits_BLV: jax.Array) -> None:
        self.logits_BLV = logits_BLV

    def __call__(self, tokens: Any, positions: Any, *, real_BS: Any, segment_BT: Any) -> tuple[jax.Array, None]:
        return self.logits_BLV, None

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden


def small(weight_BL: Any, *, target_BL: Any) -> Noised:
    """Canvases with given weights in the loss, which are those of the entropy too; one sample each."""
    weight_BL = jnp.asarray(weight_BL, jnp.float32)
    zeros = jnp.zeros(weight_BL.shape, jnp.int32)
    return Noised(
        tokens_BL=zeros,
        target_BL=jnp.asarray(target_BL, jnp.int32),
        weight_BL=weight_BL,
        scale_BL=weight_BL,
        samples_B=jnp.ones(len(weight_BL)),
        positions_BL=zeros,
        segments_BL=zeros + 1,
    )


def test_only_the_answer_and_its_padding_are_masked() -> None:
    batch = canvases(512)
    noised = prepared(batch)
    assert (masked(noised) <= batch.noised_BL).all()
    assert masked(noised)[:, 3:10].any(axis=0).all()
    assert np.array_equal(np.asarray(noised.tokens_BL)[~masked(noised)], batch.tokens_BL[~masked(noised)])
    assert np.array_equal(noised.target_BL, batch.tokens_BL)
    assert np.array_equal(np.asarray(noised.weight_BL) > 0, masked(noised))


def test_every_level_comes_as_often_as_any_other_and_masks_its_share() -> None:
    rows, least = 4096, 0.1
    noised = prepared(canvases(rows), least_noise=least)
    weights, scale = np.asarray(noised.weight_BL), np.asarray(noised.scale_BL)
    has_masks = weights.any(axis=1)
    levels = scale[has_masks].max(axis=1) / weights[has_masks].max(axis=1)
    assert levels.min() >= least
    assert levels.max() < 1
    expected = least + (1 - least) * (np.arange(rows) + 0.5) / rows
    missing = rows - has_masks.sum()  # rows of low levels in which no token was drawn: 7 tokens at .1 to .3
    assert 0 < missing < 0.2 * rows
    assert np.allclose(np.sort(levels)[-rows // 2 :], expected[-rows // 2 :], atol=2 / rows)
    share = masked(noised)[:, 3:10].mean()
    assert share == pytest.approx((1 + least) / 2, abs=0.02)


def test_the_weights_are_one_over_level_and_length() -> None:
    noised = prepared(canvases(256))
    weights = np.asarray(noised.weight_BL)
    assert np.allclose(np.asarray(noised.scale_BL)[masked(noised)], 1 / 7)
    unbiased = weights.sum() / 256  # the mean of a loss of 1 at every token
    assert unbiased == pytest.approx(1, abs=0.15)
    assert np.array_equal(noised.samples_B, np.ones(256))


def test_without_weighting_every_mask_counts_the_same() -> None:
    noised = prepared(canvases(64), weighting="none")
    assert np.array_equal(noised.weight_BL, noised.scale_BL)


def test_padding_may_be_left_out_of_the_loss() -> None:
    batch = canvases(256)
    noised = prepared(batch, padding_weight=0.0)
    assert masked(noised)[:, 8:10].any()
    assert not np.asarray(noised.weight_BL)[:, 8:].any()
    assert np.allclose(np.asarray(noised.scale_BL)[masked(noised) & ~batch.padding_BL], 1 / 5)


def test_padding_may_count_less_than_the_answer() -> None:
    batch = canvases(256)
    noised = prepared(batch, padding_weight=0.1)
    scale = np.asarray(noised.scale_BL)
    assert np.allclose(scale[:, :8][masked(noised)[:, :8]], 1 / 5.2)
    assert np.allclose(scale[:, 8:][masked(noised)[:, 8:]], 0.1 / 5.2)


def test_samples_of_a_packed_row_have_levels_of_their_own() -> None:
    batch = canvases(512, prompt=1, answer=3, end=6)
    two = Canvases(*(np.concatenate([x[:, :6], x[:, :6]], axis=1) for x in batch))
    two.segments_BL[:, 6:] = 2
    noised = prepared(two)
    assert np.array_equal(noised.samples_B, np.full(512, 2.0))
    assert np.allclose(np.asarray(noised.scale_BL)[masked(noised)], 1 / 5)
    level = np.asarray(noised.scale_BL / jnp.maximum(noised.weight_BL, 1e-9))
    left, right = level[:, :6].max(axis=1), level[:, 6:].max(axis=1)
    both = (left > 0) & (right > 0)
    assert abs(np.corrcoef(left[both], right[both])[0, 1]) < 0.7
    assert not np.isclose(left[both], right[both]).any()


def test_empty_rows_count_nothing() -> None:
    batch = canvases(2)
    empty = Canvases(*(np.concatenate([x[:1], np.zeros_like(x[1:])]) for x in batch))
    noised = prepared(empty)
    assert np.array_equal(noised.samples_B, [1, 0])
    assert not masked(noised)[1].any()


def test_blocks_before_the_open_one_are_clean_and_those_behind_it_masked() -> None:
    batch = canvases(512, prompt=2, answer=8, end=11)  # 9 tokens: blocks of 4, 4 and 1
    noised = prepared(batch, block_length=4)
    weights = np.asarray(noised.weight_BL) > 0
    first = np.where(weights.any(axis=1), (weights.argmax(axis=1) - 2) // 4, -1)
    assert {0, 1, 2} <= set(first)
    for row, block in enumerate(first):
        if block >= 0:
            start, stop = 2 + 4 * block, min(6 + 4 * block, 11)
            assert not masked(noised)[row, :start].any()
            assert masked(noised)[row, stop:11].all()
            assert not weights[row, stop:].any()
            assert np.allclose(np.asarray(noised.scale_BL)[row][weights[row]], 1 / (stop - start))


def test_of_blocks_of_padding_alone_only_the_first_is_drawn() -> None:
    batch = canvases(512, prompt=2, answer=3, end=11)  # blocks of 2: two with the answer, three of padding
    weights = np.asarray(prepared(batch, block_length=2, padding_weight=0.1).weight_BL) > 0
    assert set((weights.argmax(axis=1)[weights.any(axis=1)] - 2) // 2) == {0, 1, 2}


def test_a_share_of_the_samples_is_masked_in_blocks() -> None:
    batch = canvases(1024, prompt=2, answer=8, end=10)
    noised = prepared(batch, block_length=4, block_share=0.25, weighting="none")
    scale = np.asarray(noised.scale_BL)
    in_blocks = np.isclose(scale, 1 / 4).any(axis=1)
    assert in_blocks.sum() / scale.any(axis=1).sum() == pytest.approx(0.25, abs=0.05)
    whole = scale[~in_blocks]
    assert np.allclose(whole[whole > 0], 1 / 8)
    assert ((whole[:, 2:6] > 0).any(axis=1) & (whole[:, 6:10] > 0).any(axis=1)).mean() > 0.5


def test_in_the_order_of_a_trajectory_the_last_commits_are_masked_first() -> None:
    batch = canvases(512, prompt=2, answer=8, end=11)
    order = np.zeros_like(batch.order_BL)
    order[:, 2:10] = [3, 1, 1, 2, 3, 4, 2, 1]
    noised = prepared(batch._replace(order_BL=order), order="trajectory", weighting="none")
    seen = set()
    for row in masked(noised)[:, 2:10]:
        step = order[0, 2:10]
        first = step[row].min() if row.any() else 5
        assert np.array_equal(row, step >= first)
        seen.add(int(first))
    assert seen == {1, 2, 3, 4}  # level 0 does not exist: the last commit is always masked


def test_the_loss_is_the_weighted_cross_entropy() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.125, 0.125]] * 3]))
    batch = small([[2.0, 0.0, 0.5]], target_BL=[[0, 1, 3]])
    sums = MaskedTokens(ObjectiveSettings(), MASK).sums(Table(jnp.asarray(logits)), batch)  # type: ignore[arg-type]
    assert float(sums.loss) == pytest.approx(2 * np.log(2) + 0.5 * np.log(8), abs=1e-5)
    assert (float(sums.correct), float(sums.tokens), float(sums.weight)) == (1, 2, 1)


def test_certainty_lowers_the_entropy_of_what_is_right_only() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    batch = small([[1.0, 1.0, 0.0]], target_BL=[[0, 1, 0]])
    settings = ObjectiveSettings(certainty=3.0, certainty_temperature=0.5)
    table: Any = Table(jnp.asarray(np.log(p))[None, None].repeat(3, axis=1))
    sums = MaskedTokens(settings, MASK).sums(table, batch)
    q = p**2 / (p**2).sum()
    assert float(sums.loss) == pytest.approx(np.log(2) + np.log(4) - 3 * (q * np.log(q)).sum(), abs=1e-5)


def test_only_masked_tokens_that_count_get_a_gradient() -> None:
    batch = canvases(8)
    objective = MaskedTokens(ObjectiveSettings(certainty=1.0, padding_weight=0.0), MASK)
    noised = objective.prepare(batch, jax.random.key(1))
    noised = dataclasses.replace(noised, target_BL=noised.target_BL % 4)

    def loss(logits: jax.Array) -> jax.Array:
        return objective.sums(Table(logits), noised).loss  # type: ignore[arg-type]

    gradient = jax.grad(loss)(jax.random.normal(jax.random.key(2), (8, LENGTH, 4)))
    assert np.array_equal(np.abs(gradient).sum(axis=-1) > 0, masked(noised) & ~batch.padding_BL)


@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_are_those_of_finite_differences(shift: int) -> None:
    with jax.enable_x64(True):
        config = dataclasses.replace(DIFFUSION, logit_shift=shift, remat=True)
        model = Transformer(config, dtype=jnp.dtype("float64"), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model)
        objective = MaskedTokens(ObjectiveSettings(certainty=0.5), MASK)
        noised = objective.prepare(canvases(2), jax.random.key(3))

        @jax.jit
        def loss(params: nnx.State) -> jax.Array:
            return objective.sums(nnx.merge(graphdef, params), noised).loss

        assert loss(params).dtype == jnp.float64
        check_grads(loss, (params,), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


def test_what_stands_behind_the_canvas_changes_nothing() -> None:
    graphdef, params = nnx.split(Transformer(DIFFUSION, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    objective = MaskedTokens(ObjectiveSettings(), MASK)
    batch = canvases(4)
    other = batch._replace(tokens_BL=np.where(batch.segments_BL > 0, batch.tokens_BL, 33).astype(np.int32))

    @jax.jit
    def loss(tokens: Canvases) -> jax.Array:
        return objective.sums(nnx.merge(graphdef, params), objective.prepare(tokens, jax.random.key(0))).loss

    assert float(loss(batch)) == float(loss(other))
