"""Dream's released sampler (generation_utils.py) reproduced step by step: golden section G."""

import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings
from tests.traces import Case, assert_trace, cases


@pytest.mark.parametrize("case", cases("G_dream_diffusion"), ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    args, (prompt,) = case.args, case.arrays["prompt"]
    decode = DecodeSettings(
        policy=args["alg"], gen_length=args["max_new_tokens"], steps=args["steps"], eps=args["eps"], batch_size=1
    )
    result = Decoder(load_model(case.checkpoint), Config(decode=decode))([prompt.tolist()])
    assert_trace(result, prompt, 0, wanted=case.arrays["trace"][:, 0])
    assert result.nfe_B == case.meta["steps_run"]
    golden(case)
