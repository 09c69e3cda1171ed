"""`decode.cache=block` is exact: the tokens and their order are those of a decode without a cache."""

import numpy as np
import pytest

from dllm_jax.decoding.caching import FinalCache
from dllm_jax.settings import POLICY_FITS
from tests.decoding.blocks import BLOCK, FDV2, GEN, LENGTHS, PART, PROMPTS, SDAR, decoder, order
from tests.traces import MASK, carries

PROMPT_B = np.array(LENGTHS)
QUICK = [
    (SDAR, "threshold", {}),
    (SDAR, "dynamic", {"temperature": 0.8, "top_k": 20, "top_p": 0.9}),
    (SDAR, "edit", {}),
    (FDV2, "threshold", {"sub_block_length": PART}),
]
SLOW = [
    (SDAR, "random", {}),
    (SDAR, "dico", {}),
    (FDV2, "low_confidence", {"temperature": 1.0}),
    *((SDAR, policy, {}) for policy in ("factor", "low_confidence", "dynamic", "sequential", "learn2pd", "klass")),
    *((SDAR, policy, {}) for policy in ("local_leap", "r2", "credit", "eb", "hierarchy", "frechet")),
    (SDAR, "entropy_threshold", {}),
    (SDAR, "threshold", {"cfg_scale": 0.5}),
    (SDAR, "edit", {"edit.penalty": 0.7, "edit.editing_threshold": 0.0}),
    (SDAR, "low_confidence", {"steps": 6, "gen_length": 20, "stop": "block_eos"}),
    (SDAR, "threshold", {"sub_block_length": PART}),
    (SDAR, "dico", {"sub_block_length": PART}),
    (SDAR, "dico", {"gen_length": 5, "stop": "block_eos"}),
    *((FDV2, policy, {}) for policy in ("factor", "random", "dynamic", "sequential", "edit", "learn2pd", "dico")),
    (FDV2, "credit", {"sub_block_length": PART}),
    (FDV2, "threshold", {"cfg_scale": 0.5, "stop": "early_eos"}),
]


def closings(checkpoint: str, *, gen_length: int) -> np.ndarray:
    """Forwards of every row that a cache costs: those that close a block, and the prompt's."""
    if checkpoint == FDV2:  # it closes its blocks in any case, but for those of the prompt
        return (PROMPT_B >= BLOCK) & (PROMPT_B % BLOCK > 0)
    blocks_B = (PROMPT_B + gen_length - 1) // BLOCK - PROMPT_B // BLOCK + 1
    return blocks_B + (PROMPT_B >= BLOCK)


@pytest.mark.parametrize(
    ("checkpoint", "policy", "settings"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_a_cached_decode_is_the_uncached_one(checkpoint: str, policy: str, settings: dict) -> None:
    cached = decoder(checkpoint, policy, cache="block", **settings)(PROMPTS)
    plain = decoder(checkpoint, policy, cache="none", **settings)(PROMPTS)
    for field in ("tokens_BG", "end_B", "finish_reason"):
        np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field), err_msg=field)
    np.testing.assert_array_equal(order(cached), order(plain))
    np.testing.assert_allclose(cached.confidence_BG, plain.confidence_BG, atol=1e-3)
    assert "error" not in cached.finish_reason
    goes_to_its_end_B = plain.end_B == plain.tokens_BG.shape[1]
    assert goes_to_its_end_B.sum() > 4
    extra_B = cached.nfe_B - plain.nfe_B - closings(checkpoint, gen_length=plain.tokens_BG.shape[1])
    if policy == "edit":  # as released, a cached forward may find out that it is one too many for its block
        assert (extra_B >= 0).all()
        assert (extra_B <= 1 + GEN // BLOCK).all()
        extra_B = np.zeros_like(extra_B)
    assert not extra_B[goes_to_its_end_B].any()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dawn", "clad"])
def test_policies_that_look_at_attention_decode_without_a_cache(policy: str) -> None:
    for checkpoint in (SDAR, FDV2):
        decode = decoder(checkpoint, policy)
        assert decode.config.decode.cache == "none"
        batch = decode(PROMPTS)
        for row in (0, 1, 4):
            alone = decode([PROMPTS[row]], rows=[row])
            np.testing.assert_array_equal(batch.tokens_BG[row], alone.tokens_BG[0])
            assert batch.nfe_B[row] == alone.nfe_B[0]


def test_every_policy_is_here() -> None:
    tried = {case[1] for case in (*QUICK, *SLOW)}
    fits = {policy for policy, fits in POLICY_FITS.items() if fits.block_causal and "block" in fits.caches}
    assert tried == fits


@pytest.mark.parametrize("row", [0, 2])
def test_a_cached_step_runs_the_block(row: int) -> None:
    """And the first one the prompt."""
    decode = decoder(SDAR, "threshold")
    assert decode.axes.cache == FinalCache(BLOCK, MASK)
    engine = decode.engine(LENGTHS[row])
    result = decode([PROMPTS[row]])
    steps = int(result.nfe_B[0]) - (LENGTHS[row] >= BLOCK)  # a forward of the prompt runs in any case
    assert result.iterations == steps + 1
    assert result.columns == engine.geometry.prompt_length + steps * BLOCK


def test_rows_of_both_widths_are_in_one_step() -> None:
    decode = decoder(FDV2, "threshold", sub_block_length=PART, sub_block_cache=True)
    engine = decode.engine(max(LENGTHS))
    assert engine.cache.widths(engine.geometry) == (PART, BLOCK)
    widths = []
    with decode.computing():
        before = None
        for carry in carries(engine, decode.start(PROMPTS, range(8), engine.geometry)):
            if before is not None:
                span = engine.cache.span(before, engine.slots(before).first)
                widths.append(set(np.asarray(span.end_B - span.first)[np.asarray(before.live_B)].tolist()))
            before = carry.state
        final = np.asarray(carry.state.tokens_BL)[:, engine.geometry.prompt_length :][:, :GEN]
    assert {PART, BLOCK} in widths
    assert {PART} in widths
    result = decode(PROMPTS)
    np.testing.assert_array_equal(result.tokens_BG, final)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        np.testing.assert_array_equal(result.tokens_BG[row], alone.tokens_BG[0])
        assert result.nfe_B[row] == alone.nfe_B[0]
