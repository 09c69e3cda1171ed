"""APD beyond the recorded runs: windows at every edge, rows of a batch, the law of its target, one program."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from scipy.stats import chisquare

from dllm_jax import api, load_model
from dllm_jax.config import Config
from dllm_jax.decoding import canvas, driver
from dllm_jax.decoding.blocks import Sliding
from dllm_jax.decoding.caching import Span, WindowCache
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.apd import Apd
from dllm_jax.decoding.policies.base import Sizes
from dllm_jax.decoding.prediction import Sampler, predict
from dllm_jax.decoding.sampling import KeyedNoise
from dllm_jax.decoding.state import DecodeResult, DecodeState
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.settings import ApdSettings, DecodeSettings
from tests.hlo import loop_copies
from tests.traces import GOLDENS, MASK, carries
from tests.views import a_view

CHECKPOINTS = GOLDENS / "checkpoints"
GEN_LENGTH, LOOKAHEAD = 24, 6
LONGEST_PROMPT, LONGEST = 12, 40
COMPARED = ("tokens_BG", "commit_step_BG", "nfe_B", "end_B")
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=5 + 4 * seed).tolist() for seed in range(4)]


@functools.cache
def models(name: str = "llada-tiny-gqa", mesh: Mesh | None = None) -> tuple[Model, Model]:
    return load_model(CHECKPOINTS / name, mesh=mesh), load_model(CHECKPOINTS / "qwen2-tiny", mesh=mesh)


def decoder(
    *,
    cache: str = "window",
    temperature: float = 0.0,
    batch_size: int = 4,
    model: str = "llada-tiny-gqa",
    mesh: Mesh | None = None,
    **apd: float,
) -> Decoder:
    decode = DecodeSettings(
        policy="apd", cache=cache, gen_length=GEN_LENGTH, temperature=temperature, batch_size=batch_size
    )
    asked = ApdSettings(**{"kv_window": 3, "max_lookahead": LOOKAHEAD} | apd)
    base, verifier = models(model, mesh)
    return Decoder(base, Config(decode=decode, apd=asked), verifier=None if asked.tokens_per_step else verifier)


def rows_of(result: DecodeResult, rows: list[int]) -> DecodeResult:
    return dataclasses.replace(result, **{name: getattr(result, name)[rows] for name in COMPARED})


def assert_same(got: DecodeResult, want: DecodeResult) -> None:
    for name in COMPARED:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


# -- the window


@given(
    data=st.data(), kv_window=st.integers(0, 30), lookahead=st.integers(1, 30), prompt=st.integers(1, LONGEST_PROMPT)
)
@settings(max_examples=100, deadline=None)
def test_a_window_stays_inside_its_slice_and_a_slice_inside_the_columns(
    data: st.DataObject, kv_window: int, lookahead: int, prompt: int
) -> None:
    gen_length = data.draw(st.integers(lookahead, LONGEST))
    strategy, geometry = WindowCache(kv_window, lookahead), Geometry(prompt, gen_length, gen_length)
    columns, width = strategy.columns(geometry), max(strategy.widths(geometry), default=0)
    accepted = []
    while sum(accepted) < gen_length:
        accepted.append(data.draw(st.integers(1, min(lookahead, gen_length - sum(accepted)))))
    cursors_S = prompt + np.cumsum([0, *accepted])  # before every step, and behind the last
    spans = spans_of(strategy, geometry, cursors_S)
    np.testing.assert_array_equal(spans.seen_B, np.minimum(cursors_S + lookahead, geometry.length))
    assert cursors_S.max() + lookahead <= Sliding(lookahead).columns(geometry)
    if not kv_window:
        return
    assert width <= min(kv_window + 2 * lookahead - 1, geometry.length)
    assert (spans.first + width).max() <= columns  # also behind the last step: its cache is still written
    known = cursors_S[0]  # columns whose keys and values are of real tokens
    for step in range(1, len(accepted)):
        left, cursor = int(spans.first[step]), cursors_S[step]
        assert left == max(cursor - kv_window - accepted[step - 1] + 1, 0)
        assert left <= known
        assert spans.seen_B[step] <= left + width
        known = cursor


def spans_of(strategy: WindowCache, geometry: Geometry, cursors_S: np.ndarray) -> Span:
    """The spans of a row before each of its steps, as those of a batch; of one shape for all examples."""
    columns, steps = np.arange(LONGEST_PROMPT + 2 * LONGEST), np.arange(LONGEST + 1)
    step_L = np.searchsorted(cursors_S, columns, side="right") % len(cursors_S)  # that commits a column; 0: none
    row_B = jnp.asarray(steps)
    state = DecodeState.start(
        jnp.zeros((len(steps), len(columns)), int), pad_B=0 * row_B, row_B=row_B, live_B=row_B >= 0, geometry=geometry
    )
    done_SL = np.where(step_L <= steps[:, None], step_L, 0)
    state = dataclasses.replace(state, commit_step_BL=jnp.asarray(done_SL), nfe_B=row_B)
    masked_BL = (state.commit_step_BL == 0) & canvas.between(state.block_end_B, state.end_B, columns=len(columns))
    blocks = Sliding(strategy.lookahead)
    start_B, end_B = blocks.begin(state, masked_BL, geometry)
    state = dataclasses.replace(state, block_start_B=start_B, block_end_B=end_B)
    span = strategy.span(state, blocks.first_slot(state, geometry))
    return Span(*(np.asarray(columns_S)[: len(cursors_S)] for columns_S in span[:3]))


# -- what is accepted


@pytest.mark.parametrize(("cache", "temperature"), [("none", 0.0), ("window", 0.0), ("window", 1.0)])
def test_a_mixture_of_the_diffusion_model_alone_accepts_every_draft(cache: str, temperature: float) -> None:
    result = decoder(cache=cache, temperature=temperature, mixture_weight=1.0, max_lookahead=7)(PROMPTS)
    full_B = result.end_B == GEN_LENGTH
    assert full_B.any()
    np.testing.assert_array_equal(result.nfe_B, -(-result.end_B // 7))
    np.testing.assert_array_equal(result.commit_step_BG[full_B], [np.arange(GEN_LENGTH) // 7 + 1] * full_B.sum())


@pytest.mark.parametrize(("tokens", "forwards"), [(1, 24), (5, 5), (6, 4)])
def test_left_to_right_commits_so_many_tokens(tokens: int, forwards: int) -> None:
    result = decoder(tokens_per_step=tokens)(PROMPTS)
    want = np.where(np.arange(GEN_LENGTH) < result.end_B[:, None], np.arange(GEN_LENGTH) // tokens + 1, 0)
    np.testing.assert_array_equal(result.commit_step_BG, want)
    assert result.nfe_B.max() == forwards


def test_the_target_of_the_verifier_alone_is_drawn_from_its_softmax() -> None:
    """At R = 0, T = 1: for the first token, and for the second behind a given first one."""
    draws = 4096
    base, verifier = models()
    sampler = Sampler.from_settings(DecodeSettings(temperature=1.0), base.config, end_ids=()).with_tempered_noise()
    policy = Apd(verifier.graphdef, verifier.params, jnp.float32(0), sampler, end_ids=(300,))
    prompt, first = [17, 5, 230], 99
    geometry = Geometry(len(prompt), 2, 2, slack=4)
    tokens_BL = jnp.tile(jnp.array([[*prompt, *[310] * 6]]), (draws, 1))
    zero_B = jnp.zeros(draws, int)
    state = DecodeState.start(tokens_BL, pad_B=zero_B, row_B=jnp.arange(draws), live_B=zero_B == 0, geometry=geometry)
    position_BQ = jnp.tile(jnp.arange(2), (draws, 1))
    gumbel_BQV = KeyedNoise(jax.random.key(3)).gumbel(state.row_B, state.nfe_B, position_BQ, vocab_size=320)
    logits_BQV = jnp.zeros((draws, 2, 320)).at[:, 0, first].set(100.0)  # the draft is certain of its first token
    view = a_view(position_BQ >= 0, start_B=zero_B + 3, end_B=state.end_B, row_B=state.row_B)
    prediction = predict(logits_BQV, sampler, gumbel_BQV=gumbel_BQV)
    target_BQ = policy.verify(policy.init(state, geometry, Sizes(2, 320)), prediction, view)[0]
    expected_QV = jax.nn.softmax(api.logits(verifier, [[*prompt, first]])[0, -2:], axis=-1)
    for tokens_B, expected_V in zip(np.asarray(target_BQ).T, np.asarray(expected_QV, np.float64), strict=True):
        likely = expected_V * draws >= 5
        assert likely.sum() > 20
        counts = np.bincount(tokens_B, minlength=320)
        observed, wanted = (np.append(x[likely], x[~likely].sum()) for x in (counts, expected_V * draws))
        assert chisquare(observed, wanted * draws / wanted.sum()).pvalue > 0.01


@pytest.mark.parametrize("tempered", [True, False])
def test_the_noise_is_tempered_as_released_or_not(tempered: bool) -> None:
    sampler, temperature = decoder(temperature=0.4, temper_noise=tempered).sampler, 0.4
    draw = np.random.default_rng(0)
    logits_BQV, uniform_BQV = draw.normal(0, 3, (1, 500, 9)), draw.uniform(size=(1, 500, 9))
    noise_BQV = (-np.log(uniform_BQV)) ** (temperature if tempered else 1.0)
    gumbel_BQV = -np.log(-np.log(uniform_BQV))
    token_BQ = predict(jnp.asarray(logits_BQV), sampler, gumbel_BQV=jnp.asarray(gumbel_BQV)).token_BQ
    np.testing.assert_array_equal(token_BQ, (np.exp(logits_BQV / temperature) / noise_BQV).argmax(axis=-1))


def test_a_row_ends_with_the_step_that_accepts_eos() -> None:
    result = decoder(cache="none", mixture_weight=1.0, temperature=1.0)(PROMPTS * 8)
    ended = [row for row in range(len(result.nfe_B)) if result.finish_reason[row] == "eos"]
    assert ended
    for row in ended:
        first, end = int(result.num_tokens_B[row]), int(result.end_B[row])
        last_step = result.commit_step_BG[row, first]
        assert last_step == result.nfe_B[row]
        assert end == (result.commit_step_BG[row] > 0).sum() > first
        assert (result.tokens_BG[row, end:] == 300).all()


def test_the_mask_token_is_never_drafted() -> None:
    decode = decoder(mixture_weight=1.0)
    often = int(np.bincount(decode(PROMPTS).tokens_BG.ravel()).argmax())
    head_DV = decode.model.params["head"].get_value()
    params = jax.tree.map(lambda x: x, decode.model.params)
    params["head"] = params["head"].replace(head_DV.at[:, MASK].set(2 * head_DV[:, often]))
    decode.model = dataclasses.replace(decode.model, params=params)
    result = decode(PROMPTS)
    assert not (result.tokens_BG == MASK).any()
    np.testing.assert_array_equal(result.nfe_B, -(-result.end_B // LOOKAHEAD))


def test_a_vocabulary_wider_than_the_verifiers() -> None:
    decode = decoder(model="dream-tiny-wide", temperature=3.0, mixture_weight=0.5, temper_noise=False)
    result = decode(PROMPTS)
    assert (result.tokens_BG >= 320).any()  # drafted, accepted as first of a step, and read by the verifier
    assert (result.end_B == (result.commit_step_BG > 0).sum(axis=1)).all()
    assert_same(decode(PROMPTS[::-1], rows=[3, 2, 1, 0]), rows_of(result, [3, 2, 1, 0]))


# -- one batched program


@pytest.mark.parametrize(("cache", "temperature"), [("window", 0.0), ("window", 1.0), ("none", 1.0)])
def test_rows_equal_their_single_runs(cache: str, temperature: float) -> None:
    alone = decoder(cache=cache, temperature=temperature, batch_size=1)
    batch = decoder(cache=cache, temperature=temperature, batch_size=5)
    alone.length_multiple, batch.length_multiple = 64, 96  # other padding
    together = batch(PROMPTS)
    assert len(set(together.nfe_B)) > 1
    for row, prompt in enumerate(PROMPTS):
        assert_same(rows_of(together, [row]), alone([prompt], rows=[row]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 2, 2)], ids=str)
def test_tokens_do_not_depend_on_the_mesh(shape: tuple[int, int, int]) -> None:
    data, fsdp, tensor = shape
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert_same(decoder(temperature=1.0, mesh=mesh)(PROMPTS), decoder(temperature=1.0)(PROMPTS))


@pytest.mark.parametrize(("cache", "temperature"), [("window", 0.0), ("window", 0.7), ("none", 0.0)])
def test_the_compiled_loop_is_the_python_loop(cache: str, temperature: float) -> None:
    decode = decoder(cache=cache, temperature=temperature)
    engine = decode.engine(max(map(len, PROMPTS)))
    state = decode.start(PROMPTS[:3], range(3), engine.geometry)
    ours = driver.decode(engine, state)
    *_, (oracle, _) = carries(engine, state)
    for name in ("tokens_BL", "commit_step_BL", "nfe_B", "end_B", "iterations", "columns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(oracle, name), err_msg=name)


@pytest.mark.parametrize(("cache", "depth"), [("window", 2), ("none", 1)])
def test_the_loop_copies_no_cache(cache: str, depth: int) -> None:
    decode = decoder(cache=cache)
    engine = decode.engine(20)
    state = decode.start(PROMPTS, range(4), engine.geometry)
    text = driver.decode.lower(engine, state).compile().as_text()
    kept = [decode.companions["verifier"].config] + [decode.model.config] * (cache == "window")
    for config in kept:
        shape = f"[4,{engine.geometry.columns},{config.num_kv_heads},{config.head_dim}]"
        assert shape in text
        assert loop_copies(text, shape, depth=depth) == []


def test_a_sweep_over_the_mixture_weight_compiles_once() -> None:
    decoder(mixture_weight=0.123)(PROMPTS)
    sweep = [decoder(mixture_weight=weight)(PROMPTS) for weight in (0.0, 0.5, 1.0)]
    assert sum(result.timing.compilations for result in sweep) == 0
    forwards = [result.nfe_B.sum() for result in sweep]
    assert all(more > fewer for more, fewer in itertools.pairwise(forwards))
