"""The oracle's replay against golden section D (generate_training_data.py), and how a collection continues."""

from pathlib import Path

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.errors import UsageError
from dllm_jax.settings import DecodeSettings
from dllm_jax.training.filter import collect as collecting
from dllm_jax.training.filter.collect import collect, replay
from dllm_jax.training.filter.records import Records
from tests.traces import Case, cases

CASES = [case for case in cases("D_learn2pd") if case.meta["algorithm"]["function"] == "generate_data"]


def baseline(checkpoint: Path, *, batch_size: int, gen_length: int = 96, cache: str = "none") -> Decoder:
    decode = DecodeSettings(gen_length=gen_length, block_length=32, batch_size=batch_size, cache=cache)
    return Decoder(load_model(str(checkpoint)), Config(decode=decode))


def of_prompt(records: Records, prompt: int) -> Records:
    return records.take(records.prompt_R == prompt)


ROUNDING = 1e-4  # of the reference's float32 logits against float64 ones


def assert_same(ours: Records, theirs: Records) -> None:
    np.testing.assert_allclose(ours.confidence_RQ, theirs.confidence_RQ, atol=ROUNDING)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_records_are_the_references(case: Case, golden) -> None:
    prompt = case.arrays["prompt"].tolist()
    decoder = baseline(case.checkpoint, batch_size=3)
    others = [[1, 2, 3, 4, 5], np.random.default_rng(5).integers(0, 290, size=18).tolist()]
    prompts = [others[0], *prompt, others[1]]
    answers = decoder(prompts)
    np.testing.assert_array_equal(answers.tokens_BG[1], case.arrays["correct_answer"][0, len(prompt[0]) :])
    records = replay(decoder, prompts, answers.tokens_BG, rows=[5, 6, 7])
    expected = Records(
        *(case.arrays[name] for name in ("confidence", "is_correct", "was_masked")),
        np.full(len(case.arrays["block"]), 6),
        case.arrays["block"],
        case.arrays["step"],
    )
    assert_same(of_prompt(records, 6), expected)
    alone = [(records.prompt_R == row).sum() for row in (5, 6, 7)]
    assert len(set(alone)) > 1  # the rows really needed different numbers of forwards
    golden(case)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_every_block_begins_masked_and_ends_filled(cache: str) -> None:
    decoder = baseline(CASES[0].checkpoint, batch_size=2, gen_length=64, cache=cache)
    prompts = [[3, 1, 4, 1, 5], list(range(20))]
    records = replay(decoder, prompts, decoder(prompts).tokens_BG, rows=[0, 1])
    for prompt in range(2):
        for block in range(2):
            part = of_prompt(records, prompt)
            part = part.take(part.block_R == block)
            np.testing.assert_array_equal(part.step_R, np.arange(len(part.step_R)))
            assert part.masked_RQ[0].all()
            left = [row.sum() for row in part.masked_RQ]
            assert left == sorted(left, reverse=True)
            assert len(left) <= 33
            for step, after in zip(part.masked_RQ, part.masked_RQ[1:], strict=False):
                assert not (after & ~step).any()


def test_an_interrupted_collection_continues(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 290, size=6 + i).tolist() for i in range(5)]
    decoder = baseline(CASES[0].checkpoint, batch_size=2, gen_length=32)
    whole = collect(decoder, prompts, folder=tmp_path / "whole", identity={"seed": 0}, overwrite=False)
    assert set(whole.prompt_R) == set(range(5))

    decoded = []

    def stumbling(*args: object, **kwargs: object) -> Records:
        decoded.append(kwargs["rows"])
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return replay(*args, **kwargs)

    monkeypatch.setattr(collecting, "replay", stumbling)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        collect(decoder, prompts, folder=cut, identity={"seed": 0}, overwrite=False)
    assert len(list(cut.glob("*.safetensors"))) == 2
    with pytest.raises(UsageError, match="seed 0 instead of 1"):
        collect(decoder, prompts, folder=cut, identity={"seed": 1}, overwrite=False)
    continued = collect(decoder, prompts, folder=cut, identity={"seed": 0}, overwrite=False)
    assert len(decoded) == 4  # only the last batch was decoded again
    assert_same(continued, whole)
