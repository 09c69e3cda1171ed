"""The record of a decode in blocks: forwards that close one, tokens that are written over; what a viewer shows."""

import dataclasses
import json

import numpy as np
import pytest

from dllm_jax.config import Config
from dllm_jax.data import traces
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.settings import OutputSettings
from dllm_jax.viewer.trace import State, from_row
from tests.decoding.blocks import BLOCK, FDV2, FIELDS, GEN, PART, PROMPTS, SDAR, decoder, model
from tests.decoding.test_traced import canvases
from tests.traces import MASK, carries

CASES = [(SDAR, "edit", {}), (FDV2, "threshold", {"sub_block_length": PART, "stop": "block_eos"})]


@pytest.mark.parametrize(("checkpoint", "policy", "settings"), CASES, ids=str)
def test_the_record_tells_every_forward(checkpoint: str, policy: str, settings: dict) -> None:
    plain = decoder(checkpoint, policy, **settings)
    traced = decoder(checkpoint, policy, **settings)
    values: Config = dataclasses.replace(traced.config, output=OutputSettings(trace=True))
    traced = Decoder(model(checkpoint), values)
    traced.length_multiple = plain.length_multiple
    result, without = traced(PROMPTS), plain(PROMPTS)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(result, field), getattr(without, field), err_msg=field)
    written_over = closing = 0
    replay = replayed(plain)
    for row, seen in enumerate(replay):
        told, after = result.log.row(row)["steps"], canvases(result, row)
        assert len(told) == len(after) - 1 == result.nfe_B[row] == len(seen)
        for k, (step, (closes, canvas)) in enumerate(zip(told, seen, strict=True)):
            np.testing.assert_array_equal(after[k + 1], canvas, err_msg=f"{row} {k}")
            first, behind = step["block"]
            assert first <= behind
            assert first == behind if closes else first < behind or first == GEN
            if closes:
                assert step["open"] == step["draft"] == []
                assert "retracted" not in step
            for position, token, since in step.get("retracted", []):
                assert first <= position < behind
                assert token != MASK
                assert since <= k
                assert canvas[position] not in (token, MASK)
            written_over += len(step.get("retracted", []))
            closing += closes
    assert closing > len(PROMPTS)
    assert (written_over > 0) == (policy == "edit")
    shown(result, replay, values)


def replayed(plain: Decoder) -> list[list[tuple[bool, np.ndarray]]]:
    """Of every row and forward: whether it only closed a block, and the generation after it."""
    engine = plain.engine(max(map(len, PROMPTS)))
    seen: list[list[tuple[bool, np.ndarray]]] = [[] for _ in PROMPTS]
    with plain.computing():
        state = engine.start(plain.start(PROMPTS, range(len(PROMPTS)), engine.geometry)).state
        for carry in carries(engine, state):
            for row, found in enumerate(seen):
                if carry.state.nfe_B[row] > len(found):
                    closed = bool(carry.state.closed_B[row] > state.closed_B[row])
                    tokens = np.asarray(carry.state.tokens_BL[row, engine.geometry.prompt_length :])
                    found.append((closed, tokens[: plain.config.decode.gen_length]))
            state = carry.state
    return seen


def shown(result: DecodeResult, seen: list[list[tuple[bool, np.ndarray]]], values: Config) -> None:
    """A viewer reads the lines back, and has the canvas after every forward."""
    for row, prompt in enumerate(PROMPTS[:3]):
        line = {
            "id": row,
            "text": None,
            "output_ids": result.tokens_BG[row].tolist(),
            "nfe": int(result.nfe_B[row]),
            "num_tokens": int(result.num_tokens_B[row]),
            "commit_step": result.commit_step_BG[row].tolist(),
            "finish_reason": result.finish_reason[row],
        }
        line = traces.line(
            line | result.log.row(row),
            prompt_ids=prompt,
            confidence=result.confidence_BG[row].tolist(),
            end=int(result.end_B[row]),
            codec=None,
            config=values,
            block_length=BLOCK,
        )
        trace = from_row(json.loads(json.dumps(line)))
        for k, (_, canvas) in enumerate(seen[row], 1):
            for cell, token in zip(trace.cells(k), canvas.tolist(), strict=True):
                if cell.state is not State.CUT:
                    assert (cell.state in (State.NOW, State.EARLIER)) == (token != MASK)
                    assert cell.text == f"<{token}>" or token == MASK
