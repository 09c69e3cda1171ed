"""LLaDA's released sampler (generate.py) reproduced step by step: golden section B."""

import dataclasses

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings
from tests.traces import EOS, EOT, Case, RecordedNoise, assert_trace, cases


def settings(case: Case) -> Config:
    args = case.args
    return Config(
        decode=DecodeSettings(
            policy=args.get("remasking", "low_confidence"),
            gen_length=args["gen_length"],
            block_length=args["block_length"],
            steps=args["steps"],
            temperature=args.get("temperature", 0.0),
            cfg_scale=args.get("cfg_scale", 0.0),
            logits_eos_inf=args.get("logits_eos_inf", False),
            confidence_eos_eot_inf=args.get("confidence_eos_eot_inf", False),
            batch_size=len(case.arrays["prompt"]),
        )
    )


@pytest.mark.parametrize("case", cases("B_vanilla"), ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    decoder = Decoder(load_model(str(case.checkpoint)), settings(case), end_ids=(EOS, EOT))
    decoder.noise = RecordedNoise.from_case(case)
    prompts = case.arrays["prompt"]
    result = decoder(prompts.tolist())
    for row, prompt in enumerate(prompts):
        assert_trace(result, prompt, row, wanted=case.arrays["trace"][:, row])
    np.testing.assert_array_equal(result.nfe_B, case.args["steps"])
    golden(case)


def test_temperature_zero_ignores_the_compat_switch_of_the_eos_suppression() -> None:
    (case,) = (c for c in cases("B_vanilla") if c.args.get("confidence_eos_eot_inf"))
    config = settings(case)
    compat = dataclasses.replace(config, decode=dataclasses.replace(config.decode, compat="reference"))
    model = load_model(str(case.checkpoint))
    prompts = case.arrays["prompt"].tolist()
    ours, theirs = (Decoder(model, c, end_ids=(EOS, EOT))(prompts) for c in (config, compat))
    np.testing.assert_array_equal(ours.tokens_BG, theirs.tokens_BG)
