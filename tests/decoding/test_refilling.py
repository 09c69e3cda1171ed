"""Slots that are refilled: every row stays what it is alone, whenever it comes and whoever stands beside it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.data import tasks, text
from dllm_jax.data.prompts import Prompt
from dllm_jax.decoding import streaming
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.policies.build import open_companions
from dllm_jax.decoding.refilling import refill
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.settings import DecodeSettings, FilterSettings, TokenizerSettings, VerifierSettings
from dllm_jax.timing import CompileCount

LENGTH: dict[str, Any] = {"gen_length": 32, "block_length": 16, "bucket_waste": 1.0}  # one program for all prompts
QUICK: list[dict[str, Any]] = [
    {"policy": "threshold", "cache": "dual", "stop": "eot"},
    {"policy": "apd", "cache": "window"},
    {"policy": "low_confidence", "temperature": 1.0, "cfg_scale": 0.5, "steps": 8},
]
SLOW: list[dict[str, Any]] = [
    {"policy": "threshold", "cache": "prefix"},
    {"policy": "threshold", "cache": "sliding", "blocks": "sliding"},
]
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
MIXED: list[tuple[dict[str, Any], int]] = [
    ({"policy": "threshold"}, 300),
    ({"policy": "apd", "cache": "window"}, 60),
    ({"policy": "learn2pd", "stop": "eot", "block_length": 32}, 60),
    ({"policy": "dico"}, 60),
]


def name(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("llada-tiny")


@pytest.fixture(scope="module")
def questions(model: Model) -> list[list[int]]:
    """Of all tasks, in mixed order; some with an example in front, so that they are of several buckets."""
    codec = text.load(Path(model.path), TokenizerSettings())
    assert codec
    lines = [json.loads(line) for line in tasks.HELD_OUT.read_text().splitlines()]
    draw = np.random.default_rng(3)

    def question(index: int, place: int) -> list[int]:
        asked, before = lines[place]["prompt"], lines[place - 1]
        example = f"{before['prompt']}\n{before['answer']}\n" if draw.random() < 0.3 else ""
        encoded = codec.encode(Prompt(index=index, line=1, id=index, text=example + asked))
        return encoded if len(encoded) <= 96 else codec.encode(Prompt(index=index, line=1, id=index, text=asked))

    return [question(index, int(place)) for index, place in enumerate(draw.permutation(len(lines))[:300])]


def decoder(model: Model, case: dict[str, Any], **settings: Any) -> Decoder:
    config = Config(
        decode=DecodeSettings(**{**LENGTH, **case, **settings}),
        verifier=VerifierSettings(path="verifier-tiny"),
        filter=FilterSettings(path="filter-tiny"),
    )
    return Decoder(model, config, **open_companions(config, model.mesh))


def rows_alone(model: Model, case: dict[str, Any], prompts: Sequence[Sequence[int]]) -> list[DecodeResult]:
    alone = decoder(model, case, batch_size=1, refill=0.0)
    return [alone([prompt], rows=[row]) for row, prompt in enumerate(prompts)]


def assert_rows(got: DecodeResult, want: Sequence[DecodeResult]) -> None:
    """Every row is exactly that of its single run."""
    for row, single in enumerate(want):
        for field in ("tokens_BG", "commit_step_BG", "nfe_B", "end_B", "num_tokens_B"):
            np.testing.assert_array_equal(getattr(got, field)[row], getattr(single, field)[0], err_msg=f"{field} {row}")
        assert got.finish_reason[row] == single.finish_reason[0]
        assert (got.log and got.log.row(row)) == (single.log and single.log.row(0))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_rows_equal_their_single_runs(model: Model, questions: list[list[int]], case: dict[str, Any]) -> None:
    prompts = questions[:14]
    got = decode_all(decoder(model, case, batch_size=3, refill=0.3), prompts)
    assert len(set(got.nfe_B.tolist())) > 1 or case["policy"] == "low_confidence"  # rows end at different iterations
    assert_rows(got, rows_alone(model, case, prompts))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), MIXED, ids=[name(case) for case, _ in MIXED])
def test_many_mixed_prompts(model: Model, questions: list[list[int]], case: dict[str, Any], count: int) -> None:
    prompts = questions[:count]
    got = decode_all(decoder(model, case, batch_size=8, refill=0.25), prompts)
    assert_rows(got, rows_alone(model, case, prompts))


def test_fewer_iterations(model: Model, questions: list[list[int]]) -> None:
    """Without a cache that moves all rows together, hardly a forward is run for rows that wait."""
    case = {"policy": "threshold"}
    plain = decode_all(decoder(model, case, batch_size=4, refill=0.0), questions[:32])
    refilled = decode_all(decoder(model, case, batch_size=4, refill=0.25), questions[:32])
    np.testing.assert_array_equal(plain.nfe_B, refilled.nfe_B)
    assert plain.nfe_B.sum() / 4 <= refilled.iterations < 0.85 * plain.iterations


def test_one_program_for_any_number_of_prompts(model: Model, questions: list[list[int]]) -> None:
    case = {"policy": "threshold"}
    decode, other = (decoder(model, case, batch_size=3, refill=share, seed=7) for share in (0.5, 0.2))
    alike = sorted(questions, key=len)[60:100]
    assert decode.prompt_length(len(alike[0])) == decode.prompt_length(len(alike[-1]))
    decode_all(decode, alike[:9])
    before, programs = CompileCount.now(), refill._cache_size()
    assert len(decode_all(other, alike[9:30]).nfe_B) == 21
    assert refill._cache_size() == programs
    assert (CompileCount.now() - before).programs <= 1  # at most the one that fills the first batch with zeros


def test_nothing_begins_once_it_is_halted(model: Model, questions: list[list[int]]) -> None:
    decode = decoder(model, {"policy": "threshold"}, batch_size=3, refill=0.3)
    done: list[int] = []
    for finished in decode.stream(questions[:20], halted=lambda: len(done) >= 4):
        done.extend(finished.places)
    assert 4 <= len(done) <= 4 + 2 + 3  # those that stood in the batch, and those that had ended at once
    assert len(set(done)) == len(done)


def test_prompts_of_few_buckets_share_programs(model: Model) -> None:
    decode = decoder(model, {"policy": "threshold", "bucket_waste": 0.0}, batch_size=2, refill=0.5)
    lengths = [*[100] * 3, *[20] * 9, *[60] * 2]
    groups = streaming.groups(decode, lengths)
    assert [[lengths[place] for place in places] for places in groups] == [[20] * 9, [60, 60, 100, 100, 100]]


@pytest.mark.slow
def test_a_mesh_refills_alike(questions: list[list[int]]) -> None:
    case, prompts = {"policy": "apd", "cache": "window"}, questions[:14]
    one = decode_all(decoder(load_model("llada-tiny"), case, batch_size=4, refill=0.3), prompts)
    mesh = make_mesh(data=2, tensor=2)
    sharded = decoder(load_model("llada-tiny", mesh=mesh), case, batch_size=4, refill=0.3)
    jax.clear_caches()
    many = decode_all(sharded, prompts)
    for field in dataclasses.fields(DecodeResult):
        if field.type is np.ndarray and field.name != "confidence_BG":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(many, field.name), err_msg=field.name)
    before = CompileCount.now()
    decode_all(sharded, prompts)
    assert (CompileCount.now() - before).programs <= 1  # what comes back is placed as what goes in
