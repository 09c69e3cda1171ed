"""The record that `output.trace` keeps: it changes no decode, and tells the canvas before every forward."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.checkpoints.filters import load_filter
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.policies.traced import Traced
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.settings import (
    ApdSettings,
    DecodeSettings,
    EntropyThresholdSettings,
    FilterSettings,
    Learn2pdSettings,
    OutputSettings,
    VerifierSettings,
    WinoSettings,
)
from tests.traces import GOLDENS, MASK

MODEL, VERIFIER = (str(GOLDENS / "checkpoints" / name) for name in ("llada-tiny", "qwen2-tiny"))
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=5 + 6 * seed).tolist() for seed in range(3)]
GEN = 32
CHOSEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the decode, others
    "threshold": ({"cache": "dual", "block_length": 16, "stop": "eot"}, {}),
    "wino": ({"block_length": 16}, {"wino": WinoSettings(threshold=0.1, keep=0.2)}),
    "entropy_threshold": (
        {"block_length": 8, "blocks": "pipelined"},
        {"entropy_threshold": EntropyThresholdSettings(value=3.0)},
    ),
    "apd": (
        {"cache": "window"},
        {"apd": ApdSettings(mixture_weight=0.9, kv_window=8, max_lookahead=12), "verifier": VerifierSettings(VERIFIER)},
    ),
    "learn2pd": (
        {"block_length": 32, "stop": "eot"},
        {"learn2pd": Learn2pdSettings(threshold=0.6), "filter": FilterSettings("filter-tiny")},
    ),
    "dico": ({"block_length": 16}, {}),
}


def decoder(policy: str, *, trace: bool, batch_size: int = 4) -> Decoder:
    chosen, others = CHOSEN[policy]
    decode = DecodeSettings(**{"policy": policy, "gen_length": GEN, "batch_size": batch_size} | chosen)
    config = Config(decode=decode, output=OutputSettings(trace=trace), **others)
    companions = {"verifier": load_model(VERIFIER)} if policy == "apd" else {}
    companions |= {"filter": load_filter("filter-tiny")} if policy == "learn2pd" else {}
    return Decoder(load_model(MODEL), config, **companions)


def canvases(result: DecodeResult, i: int) -> list[list[int]]:
    """The canvas after every forward, from what an output line has: commits, and what was taken back."""
    told, held = result.log.row(i)["steps"], result.log.row(i)["held"]
    final = list(zip(result.tokens_BG[i].tolist(), result.commit_step_BG[i].tolist(), strict=True))
    found = []
    for k in range(int(result.nfe_B[i]) + 1):
        canvas = [token if 0 < step <= k else MASK for token, step in final]
        for position, token, since in held:
            if since <= k and position >= result.end_B[i]:
                canvas[position] = token
        for later in told[k:]:
            for position, token, since in later.get("retracted", ()):
                if since <= k:
                    canvas[position] = token
        found.append(canvas)
    return found


@pytest.mark.parametrize(
    "policy",
    [pytest.param(policy, marks=() if policy in ("threshold", "wino") else pytest.mark.slow) for policy in CHOSEN],
)
def test_a_trace_changes_nothing_and_tells_every_canvas(policy: str) -> None:
    traced = decoder(policy, trace=True)
    result = traced(PROMPTS)
    assert isinstance(traced.policy, Traced)
    if policy in ("threshold", "wino", "learn2pd"):
        plain = decoder(policy, trace=False)
        assert not isinstance(plain.policy, Traced)
        without = plain(PROMPTS)
        for field in dataclasses.fields(DecodeResult):
            if field.type is np.ndarray:
                np.testing.assert_array_equal(getattr(result, field.name), getattr(without, field.name))
    steps = jax.tree.map(np.asarray, result.log.steps)
    retracted = 0
    for i in range(len(PROMPTS)):
        told, after = result.log.row(i)["steps"], canvases(result, i)
        assert len(told) == result.nfe_B[i] > 1
        for k, step in enumerate(told):
            first, behind = step["block"]
            assert 0 <= first < behind <= GEN
            assert step["end"] >= (told[k + 1]["end"] if k + 1 < len(told) else result.end_B[i])
            before = steps.token_BQ[i, k].tolist()  # as the device saw it
            for position in range(first, min(behind, step["end"])):
                slot = position - steps.slot_B[i, k]
                assert before[slot] == after[k][position], (k, position)
                assert (before[slot] == MASK) == (position in step["open"])
            assert len(step["draft"]) == len(step["confidence"]) == len(step["open"])
            assert all(0 <= c <= 1 for c in step["confidence"])
            proposed = dict(zip(step["open"], step["draft"], strict=True))
            now = [p for p in step["open"] if after[k + 1][p] != MASK and p < step["end"]]
            assert all(proposed[p] == after[k + 1][p] for p in now)
            retracted += len(step.get("retracted", ()))
    assert (retracted > 0) == (policy == "wino")


@pytest.mark.slow
def test_what_decoders_add() -> None:
    result = decoder("learn2pd", trace=True)(PROMPTS)
    for step in result.log.row(0)["steps"]:
        assert len(step["filter"]) == len(step["open"])
        assert all(0 <= share <= 1 for share in step["filter"])
    result = decoder("dico", trace=True)(PROMPTS)
    row = result.log.row(1)
    assert len(row["forwards"]) == len(row["steps"]) == sum(row["forwards_by_phase"].values()) == result.nfe_B[1]
    for phase, step in zip(row["forwards"], row["steps"], strict=True):
        assert set(phase["seeds"]) <= set(step["open"])


@pytest.mark.slow
def test_rows_have_the_record_of_their_single_runs_in_any_number_of_batches() -> None:
    together = decode_all(decoder("threshold", trace=True, batch_size=2), PROMPTS)
    alone = decoder("threshold", trace=True, batch_size=1)
    for i, prompt in enumerate(PROMPTS):
        single = alone([prompt], rows=[i]).log.row(0)["steps"]
        for step, want in zip(together.log.row(i)["steps"], single, strict=True):
            assert {**step, "confidence": None} == {**want, "confidence": None}
            assert step["confidence"] == pytest.approx(want["confidence"], abs=2e-4)
