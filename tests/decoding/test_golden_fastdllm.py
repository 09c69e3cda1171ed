"""Fast-dLLM's released sampler (v1/llada/generate.py) reproduced step by step: golden section C."""

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings, FactorSettings, ThresholdSettings
from tests.traces import Case, assert_trace, cases, rebuilt_trace


def settings(case: Case, *, batch_size: int) -> Config:
    args, function = case.args, case.meta["algorithm"]["function"]
    policy = next((name for name in ("threshold", "factor") if args.get(name) is not None), "low_confidence")
    return Config(
        decode=DecodeSettings(
            policy=policy,
            cache=next((cache for cache in ("prefix", "dual") if cache in function), "none"),
            gen_length=args["gen_length"],
            block_length=args["block_length"],
            steps=args["steps"],
            batch_size=batch_size,
            compat="reference" if case.name.startswith("quirk") else "none",
        ),
        threshold=ThresholdSettings(value=args.get("threshold") or 0.9),
        factor=FactorSettings(value=args.get("factor") or 1.0),
    )


def commit_order(trace: np.ndarray) -> np.ndarray:
    """For every column of a row's trace [S, L], the rank of the step that changed it last."""
    changed = np.diff(np.concatenate([trace[:1] * 0 - 1, trace]), axis=0) != 0
    last = len(trace) - 1 - changed[::-1].argmax(axis=0)
    return np.unique(last, return_inverse=True)[1]


@pytest.mark.parametrize("case", cases("C_fastdllm"), ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    prompts, trace = case.arrays["prompt"], case.arrays["trace"]
    model = load_model(str(case.checkpoint))
    result = Decoder(model, settings(case, batch_size=len(prompts)))(prompts.tolist())
    alone = Decoder(model, settings(case, batch_size=1))
    tau = case.args.get("threshold") or case.args.get("factor")
    for row, prompt in enumerate(prompts):
        ours = rebuilt_trace(result, prompt, row)
        np.testing.assert_array_equal(ours[-1], case.arrays["final"][row])
        if case.name.startswith("v0_"):  # the superseded code spends useless forwards
            assert result.nfe_B[row] == case.meta["nfe_of_v1_code_on_same_input"]
        elif len(prompts) == 1:
            assert_trace(result, prompt, row, wanted=trace[:, row], tau=tau)
        else:  # the reference's rows wait for each other
            np.testing.assert_array_equal(commit_order(ours), commit_order(trace[:, row]))
            assert result.nfe_B[row] == alone([prompt.tolist()]).nfe_B[0]
            assert result.iterations <= len(trace)
    golden(case)
