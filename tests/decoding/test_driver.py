"""The compiled loop against a plain Python loop over the same steps, and what it must not do."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding import caching, driver
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.generate import Decoder
from dllm_jax.hlo import Program
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.settings import DecodeSettings, ThresholdSettings
from tests.hlo import loop_copies
from tests.traces import GOLDENS, carries

LLADA = "llada-tiny-gqa"
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=9 + 4 * seed).tolist() for seed in range(3)]


def decoder(policy: str, cache: str, *, temperature: float = 0.0, checkpoint: str = LLADA) -> Decoder:
    decode = DecodeSettings(
        policy=policy, cache=cache, gen_length=32, block_length=8, batch_size=4, temperature=temperature
    )
    model = load_model(str(GOLDENS / "checkpoints" / checkpoint))
    return Decoder(model, Config(decode=decode, threshold=ThresholdSettings(value=0.5)))


COMBINATIONS = [  # dico under the caches: test_stopping.py
    ("low_confidence", 0.0, "none"),
    ("low_confidence", 0.0, "dual"),
    ("random", 0.0, "none"),
    ("factor", 0.0, "dual"),
    ("threshold", 0.0, "none"),
    ("threshold", 0.0, "prefix"),
    ("threshold", 0.0, "dual"),
    ("threshold", 0.7, "prefix"),
    ("dico", 0.0, "none"),
]


@pytest.mark.parametrize(("policy", "temperature", "cache"), COMBINATIONS)
def test_the_compiled_loop_is_the_python_loop(policy: str, temperature: float, cache: str) -> None:
    decode = decoder(policy, cache, temperature=temperature)
    engine = decode.engine(max(map(len, PROMPTS)))
    state = decode.start(PROMPTS, range(3), engine.geometry)
    ours = driver.decode(engine, state)
    *_, (oracle, _) = carries(engine, state)
    for name in ("tokens_BL", "commit_step_BL", "nfe_B", "block_start_B", "iterations", "columns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(oracle, name), err_msg=name)
    nfe_B = np.asarray(ours.nfe_B)
    assert nfe_B[3] == 0  # the idle row
    if policy in ("threshold", "factor"):
        assert len(set(nfe_B[:3])) > 1  # rows really finish at different iterations


@functools.cache
def compiled(cache: str, checkpoint: str) -> tuple[str, Geometry, TransformerConfig]:
    """The text of a program of four rows with a cache, its canvas and its model."""
    decode = decoder("threshold", cache, checkpoint=checkpoint)
    engine = decode.engine(20)
    state = decode.start(PROMPTS, range(3), engine.geometry)
    return driver.decode.lower(engine, state).compile().as_text(), engine.geometry, decode.model.config


@pytest.mark.parametrize(("cache", "depth"), [("prefix", 3), ("dual", 2)])  # of the cached steps' loop
def test_the_inner_loop_copies_no_cache(cache: str, depth: int) -> None:
    text, geometry, config = compiled(cache, LLADA)
    shape = f"[4,{geometry.columns},{config.num_kv_heads},{config.head_dim}]"
    assert shape in text
    assert loop_copies(text, shape, depth=depth) == []


@pytest.mark.parametrize(("cache", "checkpoint"), [("prefix", LLADA), ("dual", LLADA), ("dual", "dream-tiny")])
def test_rows_of_one_block_are_sliced_together(cache: str, checkpoint: str) -> None:
    """Nothing is gathered but the tokens' embeddings and the chosen tokens' logits; nothing is scattered."""
    text, geometry, config = compiled(cache, checkpoint)
    program = Program(text)
    inner = program.loop_bodies("cached_step")
    (outer,) = program.loop_bodies("full_step")
    runs_suffix, shift = cache == "prefix", config.logit_shift
    widths = caching.BlockCache(runs_suffix, geometry.block_length, lead=shift).widths(geometry)
    assert len(inner) == len(widths)
    seen = {geometry.length, *widths}
    expected = {4 * geometry.block_length} | {4 * width * config.embed_dim for width in seen}
    steps = [program.executed(outer, without=inner, into_fusions=True)]
    steps += [program.executed(body, into_fusions=True) for body in inner]
    gathers = [each.arrays[0].form for step in steps for each, _ in step if each.opcode == "gather"]
    assert len(gathers) == 2 * len(steps)
    assert {(dtype, math.prod(shape)) for dtype, shape in gathers} == {("f32", size) for size in expected}
    assert not [each.line for step in steps for each, _ in step if each.opcode == "scatter"]


def test_a_copy_inside_a_loop_would_be_seen() -> None:
    def swaps(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, x.shape[0], lambda i, xy: (xy[1].at[i].add(1), xy[0]), (x, y))[0]

    text = jax.jit(swaps).lower(jnp.zeros((6, 50)), jnp.ones((6, 50))).compile().as_text()
    assert loop_copies(text, "[6,50]", depth=1)


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_a_batch_that_ended_early_runs_on_a_shorter_canvas(cache: str) -> None:
    decode = decoder("threshold", cache)
    engine = decode.engine(20)
    shrinking = dataclasses.replace(engine, canvases=caching.shorter_canvases(engine.geometry, multiple=8))
    assert [canvas.gen_length for canvas in shrinking.canvases] == [32, 24, 16, 8]
    start = decode.start(PROMPTS, range(3), engine.geometry)
    early = dataclasses.replace(start, end_B=start.end_B - jnp.array([17, 20, 31, 0]))
    whole, cut = driver.decode(engine, early), driver.decode(shrinking, early)
    for name in ("tokens_BL", "commit_step_BL", "nfe_B"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name), err_msg=name)
    assert cut.columns < whole.columns


def test_prefix_widths_cover_every_suffix_with_few_programs() -> None:
    for blocks in range(1, 20):
        geometry = Geometry(prompt_length=5, gen_length=8 * blocks, block_length=8)
        strategy = caching.BlockCache(runs_suffix=True, block_width=8, lead=0)
        widths = strategy.widths(geometry)
        assert len(widths) <= caching.MAX_WIDTHS
        assert list(widths) == sorted(set(widths))
        assert widths[-1] == geometry.gen_length
        slack = strategy.columns(geometry) - geometry.length
        assert slack <= 8 * -(-blocks // caching.MAX_WIDTHS)
        assert dataclasses.replace(strategy, lead=1).columns(geometry) == geometry.length + slack
