"""The policies of models that are causal by blocks on hand-made numbers, and what such models refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import cli
from dllm_jax.config import Config, from_config_dict
from dllm_jax.decoding.build import build_geometry, suited
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.base import Commit, Policy
from dllm_jax.decoding.policies.dynamic import Dynamic, Sequential
from dllm_jax.decoding.policies.edit import Edit
from dllm_jax.decoding.sampling import KeyedNoise
from dllm_jax.errors import UsageError
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import BLOCK_STOPS, POLICY_FITS
from tests.decoding.blocks import FDV2, SDAR, config, decoder, model
from tests.traces import MASK
from tests.views import a_prediction, a_view

NOISE = KeyedNoise(jax.random.key(0))
OTHER = 1  # a token that the predictions below do not have


def places(mask_BQ: jax.Array) -> list[int]:
    return np.flatnonzero(mask_BQ[0]).tolist()


def dynamic(confidence: list[float], is_open: list[bool] | None = None, *, step: int = 0, **given: Any) -> Commit:
    values = {"threshold": 0.5, "steps_per_block": 2, "block_length": len(confidence)} | given
    policy = Dynamic(jnp.float32(values["threshold"]), jnp.int32(values["steps_per_block"]), values["block_length"])
    return asked(policy, confidence, is_open, step=step)


def asked(policy: Policy, confidence: list[float], is_open: list[bool] | None, *, step: int) -> Commit:
    open_BQ = jnp.ones((1, len(confidence)), bool) if is_open is None else jnp.array([is_open])
    view = a_view(open_BQ, block_nfe_B=jnp.full(1, step, jnp.int32))
    return policy.commit((), a_prediction(jnp.array([confidence])), view, NOISE)


def test_dynamic_takes_all_that_is_sure_or_the_scheduled_number() -> None:
    assert places(dynamic([0.6, 0.4, 0.9, 0.7]).mask_BQ) == [0, 2, 3]  # three are sure, two are due
    assert places(dynamic([0.6, 0.4, 0.3, 0.2]).mask_BQ) == [0, 1]
    assert places(dynamic([0.5, 0.5, 0.5, 0.5]).mask_BQ) == [0, 1]  # as sure as the threshold is not enough
    assert places(dynamic([0.9, 0.9, 0.9, 0.9], threshold=1.0).mask_BQ) == [0, 1]  # SDAR's static schedule
    assert places(dynamic([0.9, 0.1, 0.1, 0.1], [False, True, False, False]).mask_BQ) == [1]  # fewer than are due


def test_the_schedule_is_of_the_columns_of_the_block() -> None:
    """Whatever of them is prompt; the first steps take the remainder."""
    for step, due in enumerate((3, 3, 2)):
        commit = dynamic([0.1] * 8, [False, *[True] * 7], step=step, steps_per_block=3)
        assert places(commit.mask_BQ) == list(range(1, 1 + due))
        assert bool(commit.leave_B[0]) == (step == 2)
        commit = asked(Sequential(jnp.int32(3), 8), [0.1] * 8, [False, *[True] * 7], step=step)
        assert places(commit.mask_BQ) == list(range(1, 1 + due))


def test_more_steps_than_columns() -> None:
    """One is due in as many steps as there are columns, then none: nothing is left by then."""
    for step, due in enumerate((1, 1, 1, 0, 0, 0)):
        commit = dynamic([0.1, 0.3, 0.2], step=step, steps_per_block=6)
        assert places(commit.mask_BQ) == [1][:due]
        assert bool(commit.leave_B[0]) == (step == 5)
    assert places(dynamic([0.1, 0.9, 0.2], step=4, steps_per_block=6).mask_BQ) == [1]  # sure ones are more than none


EDIT = Edit(
    threshold=jnp.float32(0.7),
    editing_threshold=jnp.float32(0.5),
    penalty=jnp.float32(0),
    min_tokens=jnp.int32(1),
    max_post_steps=4,
    block_length=4,
    penalized=False,
    looks_again=False,
)


def edited(
    policy: Edit, confidence: list[float], token: list[int], *, posts: int = 0, step: int = 1, **given: Any
) -> Commit:
    """A step behind the first: token 0 is proposed everywhere; where `token` is the mask the slot is open."""
    token_BQ = jnp.array([token], jnp.int32)
    given = {"block_nfe_B": jnp.full(1, step, jnp.int32), "token_BQ": token_BQ} | given
    view = a_view(token_BQ == MASK, **given)
    prediction = a_prediction(jnp.array([confidence]))
    return policy.commit(jnp.full(1, posts, jnp.int32), prediction, view, NOISE)


def test_edit_commits_the_sure_and_writes_over_what_it_would_not_choose() -> None:
    commit = edited(EDIT, [0.9, 0.6, 0.6, 0.4], [MASK, MASK, OTHER, OTHER])
    assert (places(commit.mask_BQ), places(commit.edit_BQ)) == ([0], [2])
    assert not commit.leave_B[0]
    commit = edited(EDIT, [0.2, 0.6, 0.5, 0.9], [MASK, MASK, OTHER, 0])  # of nothing sure the best; 0 stands already
    assert (places(commit.mask_BQ), places(commit.edit_BQ)) == ([1], [])


def test_edit_commits_at_least_so_many() -> None:
    policy = dataclasses.replace(EDIT, min_tokens=jnp.int32(2))
    assert places(edited(policy, [0.9, 0.1, 0.3, 0.2], [MASK] * 4).mask_BQ) == [0, 2]
    assert places(edited(policy, [0.9, 0.8, 0.8, 0.2], [MASK] * 4).mask_BQ) == [0, 1, 2]
    assert places(edited(policy, [0.9, 0.1, 0.3, 0.2], [MASK, 0, 0, 0]).mask_BQ) == [0]


def test_the_prompt_is_not_edited() -> None:
    """It is not in the open range, though its columns are slots."""
    commit = edited(EDIT, [0.9] * 4, [OTHER] * 4, block_BQ=jnp.array([[False, False, True, True]]))
    assert places(commit.edit_BQ) == [2, 3]


def test_a_full_block_is_gone_over_until_nothing_changes() -> None:
    changes = edited(EDIT, [0.9] * 4, [OTHER, 0, 0, 0])
    assert (places(changes.edit_BQ), bool(changes.leave_B[0]), int(changes.policy_state[0])) == ([0], False, 1)
    assert edited(EDIT, [0.9] * 4, [0, 0, 0, 0]).leave_B[0]
    assert not edited(EDIT, [0.9] * 4, [MASK, 0, 0, 0]).leave_B[0]  # it has just filled it


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("looks_again", [False, True])
def test_the_most_forwards_of_a_full_block(most: int, looks_again: bool) -> None:
    """A forward that would be one too many is not made, or made and changes nothing."""
    policy = dataclasses.replace(EDIT, max_post_steps=most, looks_again=looks_again)
    filling = edited(policy, [0.9] * 4, [MASK, OTHER, 0, 0])
    assert (places(filling.mask_BQ), places(filling.edit_BQ)) == ([0], [1])
    assert bool(filling.leave_B[0]) == (most == 0 and not looks_again)
    posts, forwards = int(filling.policy_state[0]), 0
    while not filling.leave_B[0]:  # the model never agrees with what it said
        filling = edited(policy, [0.9] * 4, [OTHER] * 4, posts=posts)
        posts, forwards = int(filling.policy_state[0]), forwards + 1
        assert bool(places(filling.edit_BQ)) == (forwards <= most)
    assert forwards == most + looks_again
    assert int(edited(policy, [0.9] * 4, [OTHER] * 4, posts=9, step=0).policy_state[0]) == 1  # another block


def test_the_penalty_is_of_the_token_to_the_left_in_its_block() -> None:
    """Against NumPy; [MASK] to the left is a token as any other."""
    vocab, pad, start = 320, 3, 9  # columns 9 to 16: places 6, 7 | 0, 1, ... of their blocks of four
    draw = np.random.default_rng(0)
    logits_QV = draw.normal(0, 2, (8, vocab)).astype(np.float32)
    token_Q = draw.integers(0, 200, 8)
    token_Q[4] = MASK
    for place in range(1, 8):
        logits_QV[place, token_Q[place - 1]] = 8.0  # it would say again what is at its left
    policy = dataclasses.replace(EDIT, penalty=jnp.float32(9.0), penalized=True)
    wanted = logits_QV.copy()
    for place in range(8):
        if (start + place - pad) % 4:
            left = token_Q[place - 1] if place else token_Q[-1]
            wanted[place, left] -= 9.0
    shown = np.where(np.arange(vocab) == MASK, -np.inf, wanted)
    chosen_Q = shown.argmax(axis=1)
    share_Q = np.exp(wanted[np.arange(8), chosen_Q]) / np.exp(wanted).sum(axis=1)
    prediction = a_prediction(jnp.full((1, 8), 0.5), logits_BQV=jnp.asarray(logits_QV)[None])
    prediction = dataclasses.replace(prediction, mask_id=MASK)
    view = a_view(
        jnp.asarray(token_Q == MASK)[None],
        token_BQ=jnp.asarray(token_Q, jnp.int32)[None],
        start_B=jnp.full(1, start, jnp.int32),
        pad_B=jnp.full(1, pad, jnp.int32),
    )
    commit = policy.commit(jnp.zeros(1, jnp.int32), prediction, view, NOISE)
    own = np.arange(8) > 0  # what is left of the first slot is not there: slots begin with a block, or a part of one
    np.testing.assert_array_equal(commit.token_BQ[0][own], chosen_Q[own])
    np.testing.assert_allclose(commit.score_BQ[0][own], share_Q[own], rtol=1e-5)
    is_first = (start + np.arange(8) - pad) % 4 == 0
    assert (np.asarray(commit.token_BQ[0])[1:][is_first[1:]] == token_Q[:-1][is_first[1:]]).all()
    assert not (np.asarray(commit.token_BQ[0])[1:][~is_first[1:]] == token_Q[:-1][~is_first[1:]]).any()


REFUSED = [
    (SDAR, {"cache": "prefix"}, "decode.cache: expected one of none, block with a model of the family sdar, got 'pre"),
    (SDAR, {"cache": "dual"}, "decode.cache: expected one of none, block with a model of the family sdar, got 'dual'"),
    (
        SDAR,
        {"cache": "sliding", "blocks": "sliding"},
        "decode.cache: expected one of none, block with a model of the f",
    ),
    (SDAR, {"blocks": "growing"}, "decode.blocks: expected aligned with a model of the family sdar, got 'growing'"),
    (SDAR, {"stop": "eot"}, "decode.stop: expected one of none, block_eos, early_eos with a model of the family sdar"),
    (SDAR, {"policy": "wino"}, "hierarchy, credit, eb, entropy_threshold, dawn, clad, apd, learn2pd, dico, dynamic, "),
    (SDAR, {"policy": "entropy"}, "decode.policy: expected one of low_confidence, random, threshold, factor, frechet"),
    (
        SDAR,
        {"policy": "apd", "cache": "window"},
        "decode.cache: expected none with a model of the family sdar, got 'wi",
    ),
    (
        SDAR,
        {"sub_block_length": 3},
        "decode.sub_block_length: expected a divisor of decode.block_length 8, above 0, got",
    ),
    (SDAR, {"sub_block_length": 16}, "decode.sub_block_length: expected a divisor of decode.block_length 8, above 0, "),
    (
        FDV2,
        {"sub_block_length": 1},
        "decode.sub_block_length: expected a divisor of decode.block_length 8, above 1, got",
    ),
    (
        SDAR,
        {"policy": "learn2pd", "sub_block_length": 4},
        "decode.sub_block_length: expected 8, as the filter has it, got 4",
    ),
    (SDAR, {"policy": "apd", "sub_block_length": 4}, "decode.sub_block_length: expected 0 with decode.policy apd"),
    (SDAR, {"steps": 7, "cache": "block"}, "decode.steps: expected a multiple of the number of blocks 2, got 7"),
    (
        "llada-tiny",
        {"cache": "block"},
        "decode.cache: expected one of none, prefix, dual, window, sliding with a model of the family llada, got 'b",
    ),
    (
        "llada-tiny",
        {"stop": "block_eos"},
        "decode.stop: expected one of none, eot, settled, eot+settled with a model of the family llada, got 'block_eos",
    ),
    (
        "llada-tiny",
        {"sub_block_length": 4},
        "decode.sub_block_length: expected 0 with a model of the family llada, got 4",
    ),
    (
        "llada-tiny",
        {"policy": "edit", "gen_length": 12},
        "decode.block_length: expected a divisor of decode.gen_length 12",
    ),
]


@pytest.mark.parametrize(("checkpoint", "decode", "expected"), REFUSED, ids=str)
def test_what_does_not_suit_a_model_is_refused_by_name(checkpoint: str, decode: dict, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        decoder(checkpoint, **{"policy": "threshold"} | decode)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_says_what_is_left_to_it() -> None:
    def told(checkpoint: str, **decode: Any) -> Config:
        return suited(config(**{"policy": "threshold"} | decode), model(checkpoint).config)

    assert told(SDAR).decode.cache == told(FDV2).decode.cache == "block"
    assert told("llada-tiny").decode.cache == "none"
    assert {told(SDAR, policy=policy).decode.cache for policy in ("dawn", "clad", "apd")} == {"none"}
    own = told(SDAR, block_length=0, gen_length=18, cache="block").decode
    assert own.block_length == model(SDAR).config.causal_block
    assert own.steps == -(-18 // own.block_length) * own.block_length
    assert told(SDAR, policy="dynamic", steps=8, gen_length=9).decode.steps == 8


@pytest.mark.parametrize(("gen_length", "columns"), [(1, 8), (2, 16), (8, 16), (9, 16), (10, 24), (16, 24)])
def test_the_canvas_has_room_for_the_whole_of_the_last_block(gen_length: int, columns: int) -> None:
    """Wherever the prompt ends in its block: the first of the tokens may stand in the last place of one."""
    shape = model(SDAR).config
    geometry = build_geometry(suited(config("dynamic", gen_length=gen_length), shape), shape, prompt_length=40)
    assert (geometry.prompt_length, geometry.gen_length) == (40, columns)


@pytest.mark.parametrize(
    ("name", "preset", "block_length"),
    [
        ("sdar", "sdar_8b", 4),
        ("llada2", "llada2_mini", 32),
        ("llada21", "llada2_flash", 32),
        ("fast_dllm_v2", "fast_dllm_v2_7b", 32),
    ],
)
def test_experiments_suit_their_models(name: str, preset: str, block_length: int) -> None:
    settings = from_config_dict(cli.config_module(name).get_config())
    decode = suited(settings, PRESETS[preset]).decode
    assert (decode.cache, decode.block_length, decode.steps) == ("block", block_length, decode.gen_length)
    assert decode.stop in BLOCK_STOPS
    with pytest.raises(
        UsageError, match=r"decode\.cache: expected one of none, prefix, dual, window, sliding with a mod"
    ):
        suited(settings, PRESETS["llada_8b"])


def test_blocks_that_do_not_fill_a_generation_are_asked_for() -> None:
    """A policy of any model does not say that its blocks will be counted; the cache does."""
    with pytest.raises(UsageError, match=r"got 8 \(or decode.cache=block with a model that is caus"):
        config("threshold", gen_length=13)
    assert config("threshold", gen_length=13, cache="block").decode.gen_length == 13
    with pytest.raises(UsageError, match=r"got 8$"):
        Decoder(model("llada-tiny"), config("dynamic", gen_length=13))


def test_a_policy_says_whether_it_suits() -> None:
    refused = {policy for policy, fits in POLICY_FITS.items() if not fits.block_causal}
    assert refused == {"entropy", "maskgit_plus", "topk_margin", "wino"}
