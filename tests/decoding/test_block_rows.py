"""Rows of models that are causal by blocks: any prompts together, in any order, refilled, on a mesh; their ends."""

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.decoding.generate import decode_all
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.mesh import make_mesh
from tests.decoding.blocks import (
    BLOCK,
    FDV2,
    FIELDS,
    GEN,
    LENGTHS,
    PART,
    PROMPTS,
    SDAR,
    assert_rows,
    decoder,
    masked,
    model,
)
from tests.traces import EOS, GOLDENS, MASK

QUICK = [
    (SDAR, "threshold", {}),
    (FDV2, "threshold", {"sub_block_length": PART, "sub_block_cache": True}),
]
SLOW = [
    (FDV2, "edit", {"cache": "none"}),
    (SDAR, "edit", {"stop": "block_eos"}),
    (SDAR, "random", {"cache": "block", "temperature": 1.0, "gen_length": 13}),
    (SDAR, "dynamic", {"cache": "none", "steps": 6}),
    (FDV2, "credit", {"sub_block_length": PART, "sub_block_cache": True, "temperature": 0.7, "top_k": 9}),
    (FDV2, "dico", {}),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("checkpoint", "policy", "settings"), CASES, ids=str)
def test_rows_are_their_single_runs(checkpoint: str, policy: str, settings: dict) -> None:
    decode = decoder(checkpoint, policy, **settings)
    together, backwards = decode(PROMPTS), decode(PROMPTS[::-1], rows=range(len(PROMPTS))[::-1])
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], rows=[row])
        assert_rows(together, alone, row=row)
        assert_rows(backwards, alone, row=len(PROMPTS) - 1 - row)
    assert len(set(together.nfe_B.tolist())) > 1
    decode.length_multiple = 32  # other padding
    assert_rows(together, decode(PROMPTS[1:2], rows=[1]), row=1)
    few = decoder(checkpoint, policy, batch_size=3, refill=0.3, **settings)
    refilled = decode_all(few, PROMPTS)
    for row in range(len(PROMPTS)):
        assert_rows(refilled, together, row=row, place=row)


@pytest.mark.parametrize(
    ("checkpoint", "settings"),
    [
        ("sdar-tiny", {}),
        *(
            pytest.param(name, settings, marks=pytest.mark.slow)
            for name, settings in (
                ("fdv2-tiny", {"sub_block_length": PART}),
                ("llada2-tiny", {}),  # experts, split over `tensor`
                ("sdarmoe-tiny", {}),
            )
        ),
    ],
    ids=str,
)
def test_rows_do_not_depend_on_the_mesh(checkpoint: str, settings: dict) -> None:
    one = decoder(checkpoint, "threshold", **settings)(PROMPTS)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    split = masked(load_model(GOLDENS / "checkpoints" / checkpoint, mesh=mesh))
    many = decoder(split, "threshold", **settings)(PROMPTS)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(many, field), getattr(one, field), err_msg=field)


def row_of(result: DecodeResult, row: int) -> tuple[np.ndarray, np.ndarray]:
    return result.commit_step_BG[row], result.tokens_BG[row]


@pytest.mark.parametrize(
    ("checkpoint", "settings"),
    [
        (SDAR, {"cache": "block"}),
        (FDV2, {"cache": "block", "sub_block_length": PART, "gen_length": GEN + 1}),
        pytest.param(SDAR, {"cache": "none"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_end_with_their_end_tokens(checkpoint: str, settings: dict) -> None:
    """As replayed from a decode that knows no end tokens: those do not change what is committed before."""
    plain = decoder(checkpoint, "threshold", **settings)(PROMPTS)
    assert not plain.masks_left_B.any()
    end_ids = (EOS, *np.unique(plain.tokens_BG[:, 5])[:4].tolist())  # which several rows have somewhere
    by_block = decoder(checkpoint, "threshold", end_ids=end_ids, stop="block_eos", **settings)(PROMPTS)
    early = decoder(checkpoint, "threshold", end_ids=end_ids, stop="early_eos", **settings)(PROMPTS)
    length, ended_B = plain.tokens_BG.shape[1], np.zeros(len(PROMPTS), bool)
    for row, prompt in enumerate(PROMPTS):
        steps, tokens = row_of(plain, row)
        is_first = (len(prompt) + np.arange(length)) % BLOCK == 0
        is_end = np.isin(tokens, end_ids)
        if not is_end.any():
            assert_rows(by_block, plain, row=row, place=row)
            continue
        ended_B[row] = True
        behind = min(-(-(len(prompt) + is_end.argmax() + 1) // BLOCK) * BLOCK - len(prompt), length)
        assert by_block.end_B[row] == behind
        np.testing.assert_array_equal(by_block.tokens_BG[row, :behind], tokens[:behind])
        assert (by_block.tokens_BG[row, behind:] == EOS).all()
        assert not by_block.commit_step_BG[row, behind:].any()
        last = steps[:behind].max() + (settings["cache"] == "block")  # forward of the block
        assert by_block.nfe_B[row] == last if behind < length else by_block.nfe_B[row] >= last
        # The first forward after which the first end token that is there has no mask before it. Where a token of the
        # next block comes from the forward that closes one, it counts as soon as its own block is closed.
        counts = is_end & ~is_first if checkpoint == FDV2 else is_end
        for k in range(1, by_block.nfe_B[row] + 1):
            there = counts & (steps <= k)
            if there.any() and (steps[: there.argmax()] <= k).all() and k in steps:
                assert (early.nfe_B[row], early.end_B[row]) == (k, there.argmax() + 1)
                break
        else:
            assert_rows(early, by_block, row=row, place=row)
        stop = early.end_B[row]
        np.testing.assert_array_equal(early.tokens_BG[row, :stop], tokens[:stop])
        assert early.finish_reason[row] == ("eos" if tokens[is_end][0] == EOS else "eot_id")
    assert ended_B.any()
    assert (early.end_B <= by_block.end_B).all()
    assert (early.nfe_B < by_block.nfe_B).any()


def test_a_generation_need_not_fill_its_last_block() -> None:
    """The block is decoded as a whole, and cut."""
    whole = decoder(SDAR, "dynamic", gen_length=GEN + BLOCK)(PROMPTS)
    for length in (GEN - 3, GEN + 1):
        part = decoder(SDAR, "dynamic", gen_length=length)(PROMPTS)
        np.testing.assert_array_equal(part.tokens_BG, whole.tokens_BG[:, :length])
        np.testing.assert_array_equal(part.commit_step_BG, whole.commit_step_BG[:, :length])
        assert (part.end_B == length).all()
        assert (part.nfe_B <= whole.nfe_B).all()


def test_blocks_of_a_shifted_model_are_as_many_as_are_asked_for() -> None:
    """With whole blocks a part of the prompt in the first one is missing at the end, but for a token; as released."""
    released = decoder(FDV2, "threshold", sub_block_length=PART)(PROMPTS)
    missing_B = np.maximum(np.array(LENGTHS) % BLOCK - 1, 0)
    np.testing.assert_array_equal(released.masks_left_B, missing_B)
    every = decoder(FDV2, "threshold", sub_block_length=PART, gen_length=GEN + 1)(PROMPTS)
    assert not every.masks_left_B.any()
    for row, missing in enumerate(missing_B):
        np.testing.assert_array_equal(released.tokens_BG[row, : GEN - missing], every.tokens_BG[row, : GEN - missing])
        assert (released.tokens_BG[row, GEN - missing :] == MASK).all()


def test_a_prompt_of_whole_blocks_forces_the_first_token() -> None:
    """It is the likeliest behind the prompt, also at a temperature, and costs the forward of the prompt."""
    from dllm_jax import logits

    results = [decoder(FDV2, "threshold", cache=cache, temperature=1.5)(PROMPTS) for cache in ("block", "none")]
    for row, prompt in enumerate(PROMPTS):
        if len(prompt) % BLOCK:
            continue
        last_V = np.asarray(logits(model(FDV2), [prompt], block_length=BLOCK))[0, -1].copy()
        last_V[MASK] = -np.inf
        for result in results:
            assert result.tokens_BG[row, 0] == last_V.argmax()
            assert result.commit_step_BG[row, 0] == 1
            assert (result.commit_step_BG[row, 1:] != 1).all()
