"""DiCo against its specification in plain Python, and what holds for any predictions at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies import dico
from dllm_jax.decoding.policies import dico_clusters as clusters
from dllm_jax.settings import DecodeSettings, DicoSettings
from tests import dico_reference
from tests.dico_play import play
from tests.traces import GOLDENS

GEN_LENGTH, BLOCK_LENGTH = 24, 12
FORWARDS = 2 * GEN_LENGTH + 2  # one more than a row can take
few = settings(max_examples=60, deadline=None)
flags = st.lists(st.booleans(), min_size=9, max_size=9).map(np.array)

numbers = st.fixed_dictionaries(
    {
        "num_seeds": st.integers(1, 5),
        "max_divide_steps": st.integers(0, 12),
        "tolerance": st.integers(0, 3),
        "seed_threshold": st.sampled_from([0.0, 0.2, 0.3, 0.5]),
        "low_threshold": st.sampled_from([0.2, 0.4, 0.6]),
        "factor": st.sampled_from([0.5, 1.0, 2.0]),
        "high_threshold": st.sampled_from([0.7, 0.9]),
        "gate": st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
        "margin": st.sampled_from([0.5, 1.0, 3.0]),
        "finalize_tokens": st.integers(1, 3),
        "alpha": st.sampled_from([0.0, 0.5, 1.0]),
        "beta": st.sampled_from([0.05, 0.4, 1.0]),
        "max_weight": st.sampled_from([0.5, 1.0]),
        "auto_commit": st.sampled_from([0.8, 0.98]),
        "growth_ratio": st.sampled_from([0.0, 0.1, 0.5]),
        "patience": st.integers(1, 3),
        "sigma_divisor": st.sampled_from([1.0, 3.0, 8.0]),
    }
)


def policy(chosen: DicoSettings, *, gen_length: int = GEN_LENGTH, block_length: int = BLOCK_LENGTH) -> dico.Dico:
    return dico.build(chosen, block_length=block_length, gen_length=gen_length, mask_id=-1, traced=False)


def drawn(seed: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that are alike in neighbours and change slowly from forward to forward, and margins."""
    noise = np.random.default_rng(seed).normal(size=(FORWARDS, GEN_LENGTH + 2))
    smooth = np.stack([np.convolve(row, np.ones(3) / 3, mode="valid") for row in noise])
    confidence = 1 / (1 + np.exp(-sharpness * (smooth + 0.3 * noise[:, :GEN_LENGTH])))
    return confidence.astype(np.float32), np.abs(4 * noise[:, :GEN_LENGTH]).astype(np.float32)


@pytest.mark.parametrize(
    ("weighting", "parallel_rule", "seed_method"),
    [
        ("none", "factor", "soft_nms"),
        ("exponential", "factor", "regular_interval"),
        ("linear", "fixed", "soft_nms"),
        ("static", "fixed", "regular_interval"),
    ],
)
@given(chosen=numbers, seed=st.integers(0, 2**16), sharpness=st.sampled_from([1.0, 3.0, 8.0]))
@few
def test_every_step_is_the_specifications(weighting, parallel_rule, seed_method, chosen, seed, sharpness) -> None:
    chosen = DicoSettings(**chosen, weighting=weighting, parallel_rule=parallel_rule, seed_method=seed_method)
    confidence, margin = drawn(seed, sharpness)
    want = dico_reference.Reference(chosen, confidence, margin, BLOCK_LENGTH)
    want.decode()
    got = play(policy(chosen), confidence, margin, block_length=BLOCK_LENGTH)
    for ours, theirs in zip(got["forwards"], want.forwards, strict=True):
        assert ours == theirs | {name: [list(c) for c in theirs[name]] for name in theirs if "clusters" in name}
    np.testing.assert_array_equal(got["commit_step_G"], want.commit_step)
    assert got["forwards_by_phase"] == {
        phase: sum(step["phase"] == phase for step in want.forwards) for phase in ("divide", "conquer", "finalize")
    }
    assert got["block"] == GEN_LENGTH // BLOCK_LENGTH


EXTREMES = {
    "equal": np.full((FORWARDS, GEN_LENGTH), 0.7),
    "zero": np.zeros((FORWARDS, GEN_LENGTH)),
    "one": np.ones((FORWARDS, GEN_LENGTH)),
    "tiny": np.full((FORWARDS, GEN_LENGTH), 1e-38),
    "at_the_threshold": np.full((FORWARDS, GEN_LENGTH), 0.6),
    "alternating": np.indices((FORWARDS, GEN_LENGTH)).sum(axis=0) % 2,
    "seeds_only": np.where(np.arange(FORWARDS)[:, None] % 2, 0.1, np.eye(GEN_LENGTH)[np.arange(FORWARDS) % GEN_LENGTH]),
    "random": np.random.default_rng(0).random((FORWARDS, GEN_LENGTH)),
}
masks = st.sampled_from([(), (0,), (11,), (12,), (23,), (3, 4, 20), range(12, 24), range(24)])


@pytest.mark.parametrize("extreme", EXTREMES)
@given(chosen=numbers, masks=masks, margin=st.sampled_from([0.0, 9.0]), tokens=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_row_takes_at_most_two_forwards_per_token_and_one(extreme, chosen, masks, margin, tokens) -> None:
    """With predictions of any kind, the mask token itself included, and any masks to begin with."""
    confidence = EXTREMES[extreme].astype(np.float32)
    proposals = np.random.default_rng(tokens).integers(-1, tokens, size=confidence.shape)  # at 0: all of them masks
    is_open = np.isin(np.arange(GEN_LENGTH), list(masks)) if masks else np.ones(GEN_LENGTH, bool)
    got = play(
        policy(DicoSettings(**chosen, weighting="none")),
        confidence,
        np.full_like(confidence, margin),
        block_length=BLOCK_LENGTH,
        token_FG=proposals,
        is_open_G=is_open,
    )
    assert got["block"] == GEN_LENGTH // BLOCK_LENGTH
    assert got["nfe"] <= 2 * GEN_LENGTH + 1


def runs(flags_Q: np.ndarray) -> dico_reference.Clusters:
    return dico_reference.merged([(i, i) for i in np.flatnonzero(flags_Q).tolist()])


def as_flags(found: dico_reference.Clusters, size: int) -> list[bool]:
    return [any(left <= i <= right for left, right in found) for i in range(size)]


@given(cluster_Q=flags, open_Q=flags)
@few
def test_clusters_are_runs_that_shrink_to_their_open_ends(cluster_Q: np.ndarray, open_Q: np.ndarray) -> None:
    found, size = runs(cluster_Q), len(cluster_Q)
    left_Q, right_Q = clusters.bounds(jnp.asarray(cluster_Q))
    heads_Q = clusters.heads(jnp.asarray(cluster_Q))
    assert np.flatnonzero(heads_Q).tolist() == [left for left, _ in found]
    for i in range(size):
        home = [cluster for cluster in found if cluster[0] <= i <= cluster[1]] or [(i, i)]
        assert (int(left_Q[i]), int(right_Q[i])) == home[0]
    number_Q = clusters.number(jnp.asarray(cluster_Q))
    assert number_Q.tolist() == [
        next((k for k, (left, right) in enumerate(found, 1) if left <= i <= right), 0) for i in range(size)
    ]
    widths = [right - left + 1 for left, right in found]
    assert clusters.widths(jnp.asarray(cluster_Q)).tolist() == widths + [0] * (size - len(widths))
    inner_Q = clusters.union(heads_Q, *clusters.shrunk(left_Q, right_Q, jnp.asarray(open_Q)))
    kept = [inner for cluster in found for inner in dico_reference.shrunk(cluster, open_Q)]
    assert inner_Q.tolist() == as_flags(kept, size)


@given(
    hit_Q=flags,
    tolerance=st.integers(0, 4),
    bounds=st.lists(st.tuples(*[st.integers(0, 8)] * 4).map(sorted), min_size=9, max_size=9),
)
@few
def test_growth_goes_from_hit_to_hit(hit_Q: np.ndarray, tolerance: int, bounds: list[list[int]]) -> None:
    first_Q, left_Q, right_Q, last_Q = map(jnp.asarray, np.array(bounds).T)
    got = clusters.grown(
        left_Q, right_Q, jnp.asarray(hit_Q), tolerance=jnp.int32(tolerance), first_Q=first_Q, last_Q=last_Q
    )
    for (first, left, right, last), ours in zip(bounds, np.stack(got, axis=1).tolist(), strict=True):
        down = dico_reference.scan(left - 1, first - 1, -1, hit=lambda i: hit_Q[i], tolerance=tolerance)
        up = dico_reference.scan(right + 1, last + 1, 1, hit=lambda i: hit_Q[i], tolerance=tolerance)
        assert ours == [left if down is None else down, right if up is None else up]


@given(which_Q=flags, bounds=st.lists(st.tuples(*[st.integers(0, 8)] * 2), min_size=9, max_size=9))
@few
def test_a_union_merges_what_overlaps_or_touches(which_Q: np.ndarray, bounds: list[tuple[int, int]]) -> None:
    left_Q, right_Q = map(jnp.asarray, np.array(bounds).T)
    kept = [ends for ends, is_in in zip(bounds, which_Q, strict=True) if is_in and ends[0] <= ends[1]]
    union_Q = clusters.union(jnp.asarray(which_Q), left_Q, right_Q)
    assert union_Q.tolist() == as_flags(kept, 9)
    assert runs(np.asarray(union_Q)) == dico_reference.merged(kept)


@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0, 1.5, 3.0])
def test_least_confidences_are_exact(factor: float) -> None:
    def passes(c: np.float32, n: int) -> bool:
        return int(factor / (1 - float(c) + 1e-6) - 1) >= n

    for n, least in enumerate(dico.least_confidences(64, factor=factor), 1):
        if np.isinf(least):
            assert not passes(np.float32(1), n)
        else:
            assert passes(least, n)
            assert least == 0 or not passes(np.nextafter(least, np.float32(-1)), n)


def test_other_numbers_are_exact() -> None:
    for value in (0.6, 0.1, 0.3, 0.95, 0.5):
        up = dico.rounded_up(value)
        assert float(up) >= value > float(np.nextafter(up, np.float32(0)))
    for ratio in (0.0, 0.1, 0.25):
        least = dico.grown_widths(40, ratio=ratio)
        for old in range(1, 41):
            assert [new for new in range(1, 41) if new / old >= 1 + ratio] == list(range(least[old], 41))
    for gate in (0.0, 0.2, 0.35, 0.5, 0.8, 1.0):
        made = policy(DicoSettings(gate=gate), block_length=20)
        assert made.max_rounds == int(20 * gate)
        assert [m for m in range(21) if m / 20 < 1 - gate] == list(range(int(made.least_masks)))


def decoder(cache: str, **chosen: float) -> Decoder:
    decode = DecodeSettings(policy="dico", cache=cache, gen_length=32, block_length=16, batch_size=4)
    given = {"seed_threshold": 0.02, "low_threshold": 0.1, "margin": 1.0} | chosen  # of a model that knows nothing
    config = Config(decode=decode, dico=DicoSettings(**given))
    return Decoder(load_model(str(GOLDENS / "checkpoints" / "llada-tiny")), config)


PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=5 + 6 * seed).tolist() for seed in range(4)]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rows_equal_their_single_runs_with_caches(cache: str) -> None:
    decode = decoder(cache)
    together = decode(PROMPTS)
    assert len(np.unique(together.log.forwards_3, axis=0)) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        for name in ("tokens_BG", "commit_step_BG", "nfe_B"):
            np.testing.assert_array_equal(getattr(together, name)[row], getattr(alone, name)[0], err_msg=name)
        assert together.log.row(row) == alone.log.row(0)
        assert sum(alone.log.row(0)["forwards_by_phase"].values()) == alone.nfe_B[0]


def test_a_sweep_over_numbers_compiles_once() -> None:
    jax.clear_caches()
    assert decoder("none")(PROMPTS).timing.compilations == 1
    ints = ("num_seeds", "max_divide_steps", "tolerance", "finalize_tokens", "patience")
    changed = {
        field.name: field.default + 1 if field.name in ints else field.default * 0.9
        for field in dataclasses.fields(DicoSettings)
        if not isinstance(field.default, str)
    }
    assert decoder("none", **changed)(PROMPTS).timing.compilations == 0
