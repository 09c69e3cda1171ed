"""The parallel decoders beyond the recorded runs: rows of a batch, both loops, one program for all numbers, ends."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from dllm_jax import load_model
from dllm_jax.config import Config, from_config_dict, to_config_dict
from dllm_jax.decoding import driver
from dllm_jax.decoding.engine import classes
from dllm_jax.decoding.generate import Decoder
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.settings import POLICY_FITS
from tests.decoding.blocks import SDAR, masked
from tests.traces import EOS, GOLDENS, MASK, carries

PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=7 + 4 * seed).tolist() for seed in range(3)]
# Numbers with which the rules act on the tiny models, of two layers or more.
NUMBERS = {
    "threshold.value": 0.6,
    "frechet.delta": 0.1,
    "klass.confidence": 0.3,
    "klass.divergence": 0.1,
    "local_leap.threshold": 0.7,
    "local_leap.relaxed": 0.4,
    "dawn.layers": 2,
    "dawn.edge": 0.04,
    "dawn.sink": 0.06,
    "dawn.relaxed": 0.5,
    "dawn.low": 0.4,
    "clad.threshold": 0.5,
    "clad.layers": 2,
    "r2.window_mean": 0.5,
    "r2.stable": 0.4,
    "hierarchy.threshold": 0.8,
    "hierarchy.low": 0.2,
    "credit.threshold": 0.7,
    "credit.alpha": 2.0,
    "eb.gamma": 0.5,
    "entropy_threshold.value": 0.5,
    "wino.threshold": 0.5,
    "wino.keep": 0.3,
    "sliding.margin": 5,
    "adaptive.delimiters": "3,12,21,30,39,48,57,66",
    "adaptive.threshold": 0.1,
    "pipelined.add": 0.5,
    "dynamic.threshold": 0.6,
    "edit.threshold": 0.5,
    "edit.editing_threshold": 0.5,
    "edit.penalty": 0.2,
}
EACH_ONCE = [  # policy, cache, blocks, checkpoint: every policy, cache and kind of blocks, on families of all kinds
    ("frechet", "prefix", "aligned", "llada-tiny"),
    ("klass", "dual", "adaptive", "dico-llada-smooth"),
    ("klass", "sliding", "sliding", "dico-llada-smooth"),
    ("local_leap", "none", "sliding", "dream-tiny"),
    ("dawn", "none", "aligned", "dream-tiny"),
    ("clad", "none", "adaptive", "llada-tiny-gqa"),
    ("r2", "dual", "aligned", "dream-tiny"),
    ("hierarchy", "sliding", "growing", "dream-tiny"),
    ("credit", "sliding", "sliding", "llada-tiny"),
    ("eb", "prefix", "adaptive", "dream-tiny"),
    ("wino", "none", "aligned", "dico-dream-smooth"),
    ("entropy_threshold", "none", "pipelined", "dico-dream-smooth"),
    ("dynamic", "block", "aligned", SDAR),
    ("sequential", "block", "aligned", SDAR),
    ("edit", "block", "aligned", SDAR),
]
IN_SHORT = 5  # of these in the default tier
MOSTLY_SLOW = [*EACH_ONCE[:IN_SHORT], *(pytest.param(*case, marks=pytest.mark.slow) for case in EACH_ONCE[IN_SHORT:])]
FIELDS = ("tokens_BG", "commit_step_BG", "nfe_B", "end_B")


@functools.cache
def model(checkpoint: str) -> Model:
    return masked(load_model(GOLDENS / "checkpoints" / checkpoint))


def decoder(policy: str, cache: str, blocks: str, checkpoint: str, **given: Any) -> Decoder:
    return Decoder(model(checkpoint), config(policy, cache, blocks, **given))


def config(policy: str, cache: str = "none", blocks: str = "aligned", **given: Any) -> Config:
    values = to_config_dict(Config())
    decode = {"policy": policy, "cache": cache, "blocks": blocks, "gen_length": 32, "block_length": 8, "batch_size": 4}
    for name, value in NUMBERS.items():
        section, field = name.split(".")
        values[section][field] = value
    values.decode.update(decode | given)
    return from_config_dict(values)


@pytest.mark.parametrize(("policy", "cache", "blocks", "checkpoint"), MOSTLY_SLOW)
def test_rows_of_a_batch_are_their_single_runs(policy: str, cache: str, blocks: str, checkpoint: str) -> None:
    decode = decoder(policy, cache, blocks, checkpoint)
    batch = decode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(alone, field)[0], err_msg=field)
    assert len(set(batch.nfe_B.tolist())) > 1  # rows are done at different iterations
    if policy != "sequential":  # some forward committed several tokens
        assert all(len(set(steps)) < 32 for steps in batch.commit_step_BG.tolist())
    assert not batch.masks_left_B.any()
    assert MASK not in batch.tokens_BG


@pytest.mark.parametrize(("policy", "cache", "blocks", "checkpoint"), MOSTLY_SLOW)
def test_the_compiled_loop_is_the_python_loop(policy: str, cache: str, blocks: str, checkpoint: str) -> None:
    decode = decoder(policy, cache, blocks, checkpoint)
    engine = decode.engine(max(map(len, PROMPTS)))
    state = decode.start(PROMPTS, range(3), engine.geometry)
    ours = driver.decode(engine, state)
    *_, (oracle, _) = carries(engine, state)
    for name in ("tokens_BL", "commit_step_BL", "nfe_B", "block_start_B", "iterations", "columns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(oracle, name), err_msg=name)


@pytest.mark.parametrize(
    ("policy", "cache", "blocks", "checkpoint"),
    [
        ("threshold", "none", "sliding", "llada-tiny"),
        ("credit", "none", "aligned", "llada-tiny"),
        ("threshold", "sliding", "growing", "llada-tiny"),
        ("dawn", "none", "aligned", "llada-tiny"),
        ("wino", "none", "aligned", "llada-tiny"),
        ("threshold", "dual", "adaptive", "llada-tiny"),
        ("entropy_threshold", "none", "pipelined", "llada-tiny"),
    ],
)
def test_rows_end_where_their_text_does(policy: str, cache: str, blocks: str, checkpoint: str) -> None:
    decode = decoder(policy, cache, blocks, checkpoint, stop="eot", gen_length=48, block_length=16)
    batch = decode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(alone, field)[0], err_msg=field)
    assert batch.end_B.min() < 48
    is_behind_BG = np.arange(48)[None, :] >= batch.end_B[:, None]
    assert (batch.tokens_BG[is_behind_BG] == EOS).all()
    assert not batch.commit_step_BG[is_behind_BG].any()
    assert not batch.masks_left_B.any()


@pytest.mark.parametrize("policy", POLICY_FITS)
def test_a_sweep_over_any_number_is_one_program(policy: str) -> None:
    """A program belongs to the structure, shapes and types of the engine; numbers are no part of these."""
    if policy in ("apd", "learn2pd", "dico"):
        pytest.skip("takes further parts: see the tests of its own")

    def program(settings: Config) -> Any:
        engine = Decoder(model("llada-tiny"), settings).engine(20)
        return jax.tree.structure(engine), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(engine)]

    before = config(policy)
    section = getattr(before, policy, None)
    numbers = dataclasses.fields(section) if section else []
    for field in numbers:
        value = getattr(section, field.name)
        if isinstance(value, str) or field.name in ("layers", "max_post_steps"):  # these change the program itself
            continue
        other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.9 + 0.01
        changed = dataclasses.replace(before, **{policy: dataclasses.replace(section, **{field.name: other})})
        assert program(changed) == program(before), field.name


def test_policies_with_as_many_numbers_are_several_programs() -> None:
    one_number = ("factor", "frechet", "eb", "entropy_threshold")
    engines = [Decoder(model("llada-tiny"), config(policy)).engine(20) for policy in one_number]
    assert all(len(jax.tree.leaves(engine.policy)) == 1 for engine in engines)
    for one, other in itertools.combinations(map(jax.tree.structure, engines), 2):
        assert one != other


def test_classes_inside_a_policy_count() -> None:
    """As those of the ways to choose DiCo's seeds, with as many numbers each."""

    @struct.dataclass
    class One:
        number: float

    @struct.dataclass
    class Other:
        number: float

    assert classes((One(1.0), ())) == (One,)
    assert classes(One(Other(2.0))) == (One, Other)


def test_numbers_of_blocks_and_stop_rules_are_no_part_of_the_program() -> None:
    def program(blocks: str, numbers: dict[str, float]) -> Any:
        settings = config("threshold", blocks=blocks, stop="eot+settled")
        for name, value in numbers.items():
            section, field = name.split(".")
            part = dataclasses.replace(getattr(settings, section), **{field: value})
            settings = dataclasses.replace(settings, **{section: part})
        return jax.tree.structure(Decoder(model("llada-tiny"), settings).engine(20))

    for blocks, name in [
        ("adaptive", "adaptive.threshold"),
        ("pipelined", "pipelined.add"),
        ("pipelined", "pipelined.ready"),
        ("aligned", "settled.early"),
        ("aligned", "settled.late"),
        ("aligned", "eot.min_confidence"),
    ]:
        assert program(blocks, {name: 0.25}) == program(blocks, {name: 0.75})


def test_layers_watched_are_layers_of_the_model() -> None:
    settings = config("dawn")
    settings = dataclasses.replace(settings, dawn=dataclasses.replace(settings.dawn, layers=4))
    with pytest.raises(UsageError, match=r"dawn\.layers: expected at most 3, those of the model, got 4"):
        Decoder(model("llada-tiny"), settings)


def test_delimiters_are_tokens_of_the_model() -> None:
    settings = config("threshold", blocks="adaptive")
    wrong = dataclasses.replace(settings, adaptive=dataclasses.replace(settings.adaptive, delimiters="3,320"))
    with pytest.raises(UsageError, match=r"adaptive\.delimiters: expected ids from 0 to 319, got 320"):
        Decoder(model("llada-tiny"), wrong)


@pytest.mark.parametrize(
    ("policy", "cache", "blocks"),
    [("dawn", "none", "aligned"), ("credit", "sliding", "sliding"), ("wino", "none", "aligned")],
)
def test_tokens_do_not_depend_on_the_mesh(policy: str, cache: str, blocks: str) -> None:
    """Heads, vocabulary and rows are split."""
    settings = config(policy, cache, blocks, cfg_scale=0.5)
    one = Decoder(model("llada-tiny-gqa"), settings)(PROMPTS)
    path = GOLDENS / "checkpoints" / "llada-tiny-gqa"
    split = Decoder(load_model(path, mesh=make_mesh(data=2, fsdp=1, tensor=4)), settings)(PROMPTS)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(split, field), getattr(one, field), err_msg=field)
