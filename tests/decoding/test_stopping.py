"""The stop rule eot with every policy and cache, on a model that likes to end its texts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from dllm_jax import load_model
from dllm_jax.checkpoints.filters import Filter
from dllm_jax.config import Config
from dllm_jax.decoding import driver
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.stopping import EndOfText, Look, Settled
from dllm_jax.mesh import make_mesh
from dllm_jax.models.filter import ConfidenceFilter, FilterConfig
from dllm_jax.settings import DecodeSettings, DicoSettings, EotSettings, SettledSettings, ThresholdSettings
from tests.traces import EOS, GOLDENS, carries
from tests.views import a_prediction

PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=7 + 2 * seed).tolist() for seed in range(5)]
FIELDS = ("tokens_BG", "commit_step_BG", "nfe_B", "end_B", "num_tokens_B")
COMBINATIONS = [
    ("low_confidence", "none"),
    ("random", "none"),
    ("threshold", "prefix"),
    ("factor", "dual"),
    ("learn2pd", "none"),
    ("learn2pd", "dual"),
    ("dico", "none"),
    ("dico", "prefix"),
    ("dico", "dual"),
    ("entropy", "none"),
]


def random_filter(block_length: int) -> Filter:
    config = FilterConfig(block_length)
    return Filter(config, *nnx.split(ConfidenceFilter(config, rngs=nnx.Rngs(0))))


def decoder(
    policy: str,
    cache: str,
    *,
    stop: str = "eot",
    min_confidence: float = 0.0,
    checkpoint: str = "llada-tiny",
    gen_length: int = 48,
    block_length: int = 16,
    cfg_scale: float = 0.0,
    batch_size: int = len(PROMPTS),
    mesh: Mesh | None = None,
    settled: tuple[float, float] = (7.5, 2.5),
) -> Decoder:
    decode = DecodeSettings(
        policy=policy,
        cache=cache,
        stop=stop,
        gen_length=gen_length,
        block_length=block_length,
        cfg_scale=cfg_scale,
        batch_size=batch_size,
    )
    config = Config(
        decode=decode,
        threshold=ThresholdSettings(0.6),
        eot=EotSettings(min_confidence),
        settled=SettledSettings(*settled),
        dico=DicoSettings(seed_threshold=0.02, low_threshold=0.1, margin=1.0),
    )
    model = load_model(GOLDENS / "checkpoints" / checkpoint, mesh=mesh)
    return Decoder(model, config, filter=random_filter(16))


@pytest.mark.parametrize(("policy", "cache"), COMBINATIONS)
def test_rows_end_on_their_own(policy: str, cache: str) -> None:
    decode = decoder(policy, cache)
    batch = decode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])  # in the first slot, among idle rows
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(alone, field)[0], err_msg=field)
    assert len(set(batch.end_B.tolist())) > 1
    is_behind_BG = np.arange(48)[None, :] >= batch.end_B[:, None]
    assert (batch.tokens_BG[is_behind_BG] == EOS).all()
    assert not batch.commit_step_BG[is_behind_BG].any()
    assert not batch.confidence_BG[is_behind_BG].any()
    assert (batch.nfe_B <= 2 * 48 + 1).all()


@pytest.mark.parametrize(
    ("policy", "cache"),
    [
        ("threshold", "none"),
        ("learn2pd", "dual"),
        pytest.param("dico", "prefix", marks=pytest.mark.slow),
        pytest.param("dico", "dual", marks=pytest.mark.slow),
    ],
)
def test_the_compiled_loop_is_the_python_loop(policy: str, cache: str) -> None:
    decode = decoder(policy, cache)
    engine = decode.engine(max(map(len, PROMPTS)))
    state = decode.start(PROMPTS, range(len(PROMPTS)), engine.geometry)
    ours = driver.decode(engine, state)
    *_, (oracle, _) = carries(engine, state)
    for name in ("tokens_BL", "commit_step_BL", "nfe_B", "end_B", "iterations"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(oracle, name), err_msg=name)


@pytest.mark.parametrize(("policy", "cache"), [("threshold", "none"), ("dico", "dual")])
def test_a_confidence_nothing_reaches_stops_nothing(policy: str, cache: str) -> None:
    without, never = decoder(policy, cache, stop="none")(PROMPTS), decoder(policy, cache, min_confidence=1.0)(PROMPTS)
    assert (without.confidence_BG < 1).all()
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(never, field), getattr(without, field), err_msg=field)


@pytest.mark.parametrize("cache", ["none", pytest.param("prefix", marks=pytest.mark.slow)])
def test_ended_tails_are_not_computed(cache: str) -> None:
    """What is left of the batch runs on fewer columns, and gives the same as on all of them."""
    decode = decoder("low_confidence", cache, gen_length=96)
    engine = decode.engine(max(map(len, PROMPTS)))
    early = [prompt for prompt, end in zip(PROMPTS, decode(PROMPTS).end_B, strict=True) if end <= 64]
    state = decode.start(early, range(len(early)), engine.geometry)
    ours, whole = driver.decode(engine, state), engine.geometry.length
    assert ours.columns < ours.iterations * (whole if cache == "none" else 96)
    if cache == "none":
        assert [canvas.gen_length for canvas in engine.canvases] == [96, 64, 32]
        wide = driver.decode(dataclasses.replace(engine, canvases=(engine.geometry,)), state)
        assert wide.columns == wide.iterations * whole > ours.columns
        for name in ("tokens_BL", "commit_step_BL", "nfe_B", "end_B", "iterations"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(wide, name), err_msg=name)


def test_shifted_models_stop_too() -> None:
    decode = decoder("threshold", "prefix", checkpoint="dream-tiny")
    batch = decode(PROMPTS)
    assert len(set(batch.end_B.tolist())) > 1
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(batch.tokens_BG[row], decode([prompt], rows=[row]).tokens_BG[0])


def test_guided_on_canvases_that_are_no_whole_blocks() -> None:
    decode = decoder("threshold", "none", gen_length=80, block_length=20, cfg_scale=0.5)
    assert [canvas.gen_length for canvas in decode.engine(15).canvases] == [80, 48]
    early = [prompt for prompt, end in zip(PROMPTS, decode(PROMPTS).end_B, strict=True) if end <= 48]
    batch = decode(early)
    assert len(set(batch.end_B.tolist())) > 1
    assert batch.columns < batch.iterations * decode.engine(15).geometry.length
    for row, prompt in enumerate(early):
        np.testing.assert_array_equal(batch.tokens_BG[row], decode([prompt], rows=[row]).tokens_BG[0])


@pytest.mark.slow
def test_ends_do_not_depend_on_the_mesh() -> None:
    one = decoder("learn2pd", "dual", batch_size=6)(PROMPTS)
    meshed = decoder("learn2pd", "dual", batch_size=6, mesh=make_mesh(data=2, fsdp=1, tensor=2))(PROMPTS)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(meshed, field), getattr(one, field), err_msg=field)


def test_where_a_row_is_cut() -> None:
    """Columns 10 to 15; the row ends at 16."""
    open_BS = jnp.array([[True, True, True, True, True, False]])
    columns_BS = jnp.arange(10, 16)[None]

    def end(tokens: list[int], confidence: list[float], accepted: list[int], *, least: float = 0.0) -> int:
        prediction = a_prediction(jnp.array([confidence]), token_BQ=jnp.array([tokens]))
        accepted_BS = jnp.isin(jnp.arange(6), jnp.array(accepted, int))[None]
        look = Look(prediction, columns_BS, open_BS, accepted_BS, decoded_B=jnp.zeros(1))
        return int(EndOfText(jnp.float32(least), end_ids=(0,)).apply(jnp.array([16]), look).end_B[0])

    sure = [0.1, 0.9, 0.3, 0.5, 0.2, 0.99]
    assert end([7, 7, 7, 7, 7, 0], sure, []) == 16  # the one EoS is not open
    assert end([7, 7, 0, 0, 0, 7], sure, []) == 14  # the most confident
    assert end([7, 7, 0, 0, 0, 7], sure, [4]) == 15  # an accepted one goes first
    assert end([7, 7, 0, 0, 0, 7], sure, [2, 3]) == 13  # and the first of those
    assert end([7, 7, 0, 0, 0, 7], sure, [0, 1]) == 14  # accepted, but no EoS
    assert end([7, 7, 0, 0, 0, 7], sure, [2, 4], least=0.4) == 14  # neither is confident enough
    assert end([7, 7, 7, 7, 0, 7], sure, [], least=0.21) == 16
    assert end([0, 0, 0, 0, 0, 0], [0.5] * 6, []) == 11  # of equals the first


def test_when_a_row_has_settled() -> None:
    """Thresholds fall from 8 to 4; the row is half decoded. Positions behind its end and known ones do not count."""
    rule = Settled(early=jnp.float32(8), late=jnp.float32(4))
    open_BS, columns_BS = jnp.array([[True, True, False, True]]), jnp.arange(10, 14)[None]

    def fills(margins: list[float], *, decoded: float, end: int = 14) -> bool:
        prediction = a_prediction(jnp.ones((1, 4)), margin_BQ=jnp.array([margins]))
        look = Look(prediction, columns_BS, open_BS, ~open_BS, decoded_B=jnp.array([decoded]))
        ending = rule.apply(jnp.array([end]), look)
        assert ending.end_B.tolist() == [end]
        assert ending.fill_B is not None
        return bool(ending.fill_B[0])

    assert fills([5.0, 6.0, 0.0, 7.0], decoded=0.5)
    assert not fills([5.0, 6.0, 99.0, 6.9], decoded=0.5)
    assert fills([5.0, 6.0, 0.0, 6.9], decoded=0.6)
    assert not fills([5.0, 6.0, 0.0, 7.0], decoded=0.4)
    assert fills([6.0, 6.0, 0.0, -99.0], decoded=0.5, end=13)
    assert (
        not rule.never()
        .apply(
            jnp.array([14]), Look(a_prediction(jnp.ones((1, 4))), columns_BS, open_BS, open_BS, decoded_B=jnp.ones(1))
        )
        .fill_B.any()
    )


@pytest.mark.parametrize(("cache", "forwards"), [("none", 1), ("dual", 3)])
def test_a_settled_row_commits_all_that_a_forward_predicts(cache: str, forwards: int) -> None:
    """Everything without a cache, else the block."""
    decode = decoder("low_confidence", cache, stop="settled", settled=(0.0, 0.0))
    result = decode(PROMPTS)
    assert result.nfe_B.tolist() == [forwards] * len(PROMPTS)
    steps_G = np.repeat(np.arange(1, forwards + 1), 48 // forwards)
    np.testing.assert_array_equal(result.commit_step_BG, [steps_G] * len(PROMPTS))
    assert not result.masks_left_B.any()


def test_rules_compose() -> None:
    cut = decoder("low_confidence", "none", stop="eot")(PROMPTS)
    both = decoder("low_confidence", "none", stop="eot+settled", settled=(0.0, 0.0))(PROMPTS)
    assert both.nfe_B.tolist() == [1] * len(PROMPTS)
    ends = decoder("low_confidence", "none", stop="eot+settled", settled=(1e9, 1e9))(PROMPTS)
    for field in FIELDS:  # nothing settles
        np.testing.assert_array_equal(getattr(ends, field), getattr(cut, field), err_msg=field)
    is_text_BG = np.arange(48)[None, :] < both.end_B[:, None]
    np.testing.assert_array_equal(both.commit_step_BG, is_text_BG.astype(int))


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_rows_settle_on_their_own(cache: str) -> None:
    decode = decoder("threshold", cache, stop="settled", settled=(3.0, 0.5))
    batch = decode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(alone, field)[0], err_msg=field)
    assert batch.nfe_B.sum() < decoder("threshold", cache, stop="none")(PROMPTS).nfe_B.sum()
