"""What holds for every prompt, batch and threshold, under every cache."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding import driver
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings, FactorSettings, ThresholdSettings
from tests.traces import GOLDENS, MASK

GEN_LENGTH, LONGEST = 16, 32
COMBINATIONS = [("threshold", "none"), ("threshold", "dual"), ("factor", "prefix")]
prompt_lists = st.lists(st.lists(st.integers(0, 289), min_size=1, max_size=LONGEST), min_size=1, max_size=4)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def model():
    return load_model(str(GOLDENS / "checkpoints" / "llada-tiny"))


def decoder(policy: str, cache: str, *, value: float, steps: int = 0) -> Decoder:
    decode = DecodeSettings(
        policy=policy, cache=cache, gen_length=GEN_LENGTH, block_length=8, batch_size=4, steps=steps
    )
    config = Config(decode=decode, threshold=ThresholdSettings(value=value), factor=FactorSettings(value=value))
    made = Decoder(model(), config)
    made.length_multiple = LONGEST + GEN_LENGTH  # one shape for all examples
    return made


@pytest.mark.parametrize(("policy", "cache"), COMBINATIONS)
@given(prompts=prompt_lists, value=st.floats(0.05, 1.0))
@few
def test_every_position_is_committed_once_and_the_prompt_stays(
    policy: str, cache: str, prompts: list[list[int]], value: float
) -> None:
    decode = decoder(policy, cache, value=value)
    engine = decode.engine(LONGEST)
    start = decode.start(prompts, range(len(prompts)), engine.geometry)
    final = driver.decode(engine, start)
    rows, columns = len(prompts), engine.geometry.prompt_length
    np.testing.assert_array_equal(final.tokens_BL[:, :columns], start.tokens_BL[:, :columns])
    generated = slice(columns, engine.geometry.length)
    steps = np.asarray(final.commit_step_BL)[:rows, generated]
    nfe_B = np.asarray(final.nfe_B)[:rows]
    assert (np.asarray(final.tokens_BL)[:rows, generated] != MASK).all()
    assert (steps >= 1).all()
    assert (steps <= nfe_B[:, None]).all()
    assert (nfe_B <= GEN_LENGTH).all()
    for row, nfe in zip(steps, nfe_B, strict=True):
        assert set(row) == set(range(1, nfe + 1))  # no forward commits nothing
    assert int(final.iterations) >= nfe_B.max()


@pytest.mark.parametrize(("policy", "cache"), COMBINATIONS)
@given(prompts=prompt_lists.filter(lambda prompts: len(prompts) > 1), value=st.floats(0.2, 0.8))
@few
def test_batch_mates_never_matter(policy: str, cache: str, prompts: list[list[int]], value: float) -> None:
    decode = decoder(policy, cache, value=value)
    together = decode(prompts)
    last = decode(prompts[-1:], rows=[len(prompts) - 1])
    np.testing.assert_array_equal(together.tokens_BG[-1], last.tokens_BG[0])
    np.testing.assert_array_equal(together.commit_step_BG[-1], last.commit_step_BG[0])
    assert together.nfe_B[-1] == last.nfe_B[0]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_threshold_nothing_reaches_is_one_token_per_step(cache: str) -> None:
    prompts = np.random.default_rng(0).integers(0, 290, size=(4, 20)).tolist()
    never = decoder("threshold", cache, value=1.01)(prompts)
    one_each = decoder("low_confidence", cache, value=1.0)(prompts)
    np.testing.assert_array_equal(never.tokens_BG, one_each.tokens_BG)
    np.testing.assert_array_equal(never.commit_step_BG, one_each.commit_step_BG)
    np.testing.assert_array_equal(never.nfe_B, GEN_LENGTH)


def test_a_sweep_over_thresholds_compiles_once() -> None:
    prompts = [[1, 2, 3], [4, 5]]
    assert decoder("threshold", "none", value=0.123)(prompts).nfe_B.min() >= 1
    sweep = [decoder("threshold", "none", value=value)(prompts) for value in (0.05, 0.5, 0.9)]
    assert sum(result.timing.compilations for result in sweep) == 0
    assert sweep[0].nfe_B.sum() < sweep[2].nfe_B.sum()


def test_rows_of_a_batch_finish_at_different_iterations() -> None:
    prompts = np.random.default_rng(1).integers(0, 290, size=(4, 12)).tolist()
    for policy, cache in COMBINATIONS:
        assert len(set(decoder(policy, cache, value=0.5)(prompts).nfe_B)) > 1
