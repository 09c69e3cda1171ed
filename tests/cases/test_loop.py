"""Models whose numbers are no numbers, or that would rather not answer, through the command line."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax import load_model
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings
from tests.cases.conftest import Ran, Run
from tests.traces import GOLDENS

SHORT = ("decode.gen_length=16", "input.prompt=x")
POLICIES = ("low_confidence", "threshold", "factor", "dico", "learn2pd", "entropy")


def rows(ran: Ran) -> list[dict]:
    return [json.loads(line) for line in ran.out.splitlines()]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["tiny-mask", "tiny-mask2"])
def test_a_mask_is_no_answer(run: Run, checkpoints: Path, name: str, policy: str) -> None:
    prompt = "Sort the list: oak, fern, duck."
    ran = run(
        f"model.path={checkpoints / name}",
        f"decode.policy={policy}",
        "decode.gen_length=32",
        f"input.prompt={prompt}",
        config="learn2pd" if policy == "learn2pd" else "vanilla",
    )
    (row,) = rows(ran)
    assert (ran.code, row["text"], row["num_tokens"]) == (0, "duck, fern, oak.", 7)
    assert "masks_left" not in row


@pytest.mark.parametrize("setting", ["decode.policy=threshold", "decode.policy=factor", "decode.stop=eot"])
def test_the_case_that_ran_for_ever(run: Run, checkpoints: Path, setting: str) -> None:
    model = f"model.path={checkpoints / 'tiny-mask2'}"
    ran = run(model, "decode.gen_length=32", "input.prompt=Sort the list: fern, duck.", setting)
    assert (ran.code, rows(ran)[0]["finish_reason"]) == (0, "eot_id")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_of_nan_fails_by_row(run: Run, checkpoints: Path, policy: str) -> None:
    ran = run(
        f"model.path={checkpoints / 'llada-nan'}",
        f"decode.policy={policy}",
        "decode.gen_length=32",
        "input.prompt=x",
        config="learn2pd" if policy == "learn2pd" else "vanilla",
    )
    (row,) = rows(ran)
    assert (ran.code, row["finish_reason"], row["num_tokens"], row["masks_left"]) == (1, "error", 0, 32)
    assert ran.err.splitlines()[-1].startswith("error: 1 of 1 rows ended with finish_reason error")
    assert ran.err.endswith("can need): 0\n")


def test_a_setting_that_overflows_fails_by_row(run: Run) -> None:
    ran = run(*SHORT, "decode.cfg_scale=1e38")
    assert (ran.code, rows(ran)[0]["finish_reason"]) == (1, "error")


def test_one_bad_row_of_a_job(run: Run, tmp_path: Path) -> None:
    """A token whose embedding is NaN: prompts without it are answered as by the whole model."""
    model, questions = tmp_path / "model", tmp_path / "in.jsonl"
    shutil.copytree(ASSETS / "llada-tiny", model)
    asked = [[1, 3, 70, 4], [1, 3, 505, 4], [1, 3, 71, 72, 73, 4]]
    questions.write_text("".join(json.dumps({"id": f"q{i}", "prompt_ids": p}) + "\n" for i, p in enumerate(asked)))
    settings = ("decode.gen_length=16", "decode.policy=threshold", f"input.path={questions}")
    clean = rows(run(*settings))
    weights = load_file(model / "model.safetensors")
    weights["model.transformer.wte.weight"][505] = np.nan
    save_file(weights, model / "model.safetensors")
    out = tmp_path / "out.jsonl"
    ran = run(*settings, f"model.path={model}", f"output.path={out}")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert (ran.code, ran.err.splitlines()[-1][-4:]) == (1, ": q1")
    assert [found[0], found[2]] == [clean[0], clean[2]]
    assert found[1]["finish_reason"] == "error"
    metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    assert (metrics["num_errors"], metrics["end_tokens"]) == (1, {"0": "<|endoftext|>", "5": "<|eot_id|>"})


@pytest.mark.parametrize(
    ("settings", "config", "nfe"),
    [
        (["decode.gen_length=16"], "threshold", None),
        (["decode.gen_length=64", "decode.stop=eot"], "threshold", 3),
        (["decode.gen_length=16", "verifier.path={}/qwen"], "apd", 3),
    ],
    ids=["counts", "eot", "apd"],
)
def test_dreams_turns_end(run: Run, checkpoints: Path, settings: list[str], config: str, nfe: int | None) -> None:
    asked = [setting.format(checkpoints) for setting in settings]
    ran = run(f"model.path={checkpoints / 'diffucoder'}", "input.prompt=x", *asked, config=config)
    (row,) = rows(ran)
    assert (ran.code, row["text"], row["num_tokens"], row["finish_reason"]) == (0, "Hi", 2, "eot_id")
    assert row["nfe"] == nfe or nfe is None
    assert "end of text: 300 <|endoftext|>, 302 <|im_end|>, 307 <|dlm_pad|>\n" in ran.err


def test_a_further_end_of_text(run: Run, checkpoints: Path) -> None:
    """The second token of the answer "Hi", named by the user."""
    model = f"model.path={checkpoints / 'diffucoder'}"
    ran = run(model, *SHORT, "model.eot_token_id=72", config="threshold")
    assert (rows(ran)[0]["text"], rows(ran)[0]["num_tokens"]) == ("H", 1)


def test_masks_that_a_decoder_leaves_are_named(run: Run) -> None:
    ran = run(
        "input.prompt=Sort the list: oak, fern, duck.",
        "decode.gen_length=32",
        "decode.policy=dico",
        "dico.finalize_tokens=32",
        "dico.gate=0",
        "dico.margin=12",
        "dico.auto_commit=1",
    )
    (row,) = rows(ran)
    assert row["masks_left"] == row["output_ids"].count(2) > 0


@pytest.mark.parametrize(
    ("batch_size", "waste", "batches", "programs"),
    [(1, 0.0, 60, 47), (1, 0.125, 60, 25), (1, 0.5, 60, 9), (8, 0.0, 8, 8), (8, 0.125, 8, 8), (8, 0.5, 8, 5)],
)
def test_few_programs_for_prompts_of_any_length(batch_size: int, waste: float, batches: int, programs: int) -> None:
    decode = DecodeSettings(batch_size=batch_size, gen_length=64, bucket_waste=waste)
    model = load_model(str(GOLDENS / "checkpoints" / "llada-tiny"))
    lengths = np.random.default_rng(0).permutation(np.linspace(20, 1500, 60).astype(int)).tolist()
    shapes = None
    for changed in ({}, {"policy": "dico", "cache": "dual"}, {"policy": "entropy", "block_length": 0, "steps": 8}):
        decoder = Decoder(model, Config(decode=dataclasses.replace(decode, **changed)))
        found = decoder.batches(lengths)
        assert sorted(itertools.chain(*found)) == list(range(60))
        columns = [decoder.engine(max(lengths[i] for i in batch)).geometry.columns for batch in found]
        assert (len(found), len(set(columns))) == (batches, programs)
        assert shapes in (None, (found, columns))  # all decoders of a sweep have the same
        shapes = found, columns


@pytest.mark.parametrize("length", [100, 128])
def test_no_bucket_is_longer_than_the_model_allows(length: int) -> None:
    model = load_model("llada-tiny")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=160))
    decoder, exact = (
        Decoder(model, Config(decode=DecodeSettings(batch_size=1, gen_length=32, bucket_waste=waste)))
        for waste in (2.0, 0.0)
    )
    assert (decoder.longest_prompt, decoder.engine(length).geometry.length) == (128, 160)
    prompt = [1, 3, *np.random.default_rng(0).integers(5, 500, length - 2).tolist()]
    np.testing.assert_array_equal(decoder([prompt]).tokens_BG, exact([prompt]).tokens_BG)
