"""Learn2PD's released sampler (llada/generate.py) reproduced forward by forward: golden section D."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax import load_model
from dllm_jax.checkpoints.filters import Filter, from_arrays
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.settings import DecodeSettings, Learn2pdSettings
from tests.traces import EOS, Case, carries, cases, rebuilt_trace

CASES = [case for case in cases("D_learn2pd") if case.meta["algorithm"]["function"] != "generate_data"]


def settings(case: Case, *, batch_size: int = 1) -> Config:
    args, function = case.args, case.meta["algorithm"]["function"]
    decode = DecodeSettings(
        policy="low_confidence" if function == "generate_predict_eot" else "learn2pd",
        cache=next((cache for cache in ("prefix", "dual") if cache in function), "none"),
        stop="none" if function == "generate_learn2parallel" else "eot",
        gen_length=args["gen_length"],
        block_length=args["block_length"],
        steps=args["steps"],
        cfg_scale=args.get("cfg_scale", 0.0),
        batch_size=batch_size,
    )
    return Config(decode=decode, learn2pd=Learn2pdSettings(threshold=args["accept_thres"] or 0.96))


def recorded_filter(case: Case) -> Filter | None:
    arrays = {
        name.removeprefix("filter_").replace("_", "."): array
        for name, array in case.arrays.items()
        if name.startswith("filter_linear")
    }
    return from_arrays(arrays) if arrays else None


def decoder(case: Case, *, batch_size: int = 1) -> Decoder:
    model = load_model(str(case.checkpoint))
    return Decoder(model, settings(case, batch_size=batch_size), filter=recorded_filter(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    prompts, trace = case.arrays["prompt"], case.arrays["trace"]
    decode = decoder(case)
    engine = decode.engine(prompts.shape[1])
    begin = engine.geometry.prompt_length - prompts.shape[1]
    ours = []
    for carry in carries(engine, decode.start(prompts.tolist(), [0], engine.geometry)):
        end = int(carry.state.end_B[0])
        canvas = np.full(trace.shape[1], -1)
        canvas[: end - begin] = np.asarray(carry.state.tokens_BL)[0, begin:end]
        ours.append(canvas)
    np.testing.assert_array_equal(ours, trace)

    result = decode(prompts.tolist())
    final = case.arrays["final"][0]
    kept = len(final) - prompts.shape[1]
    assert result.nfe_B[0] == len(trace)
    assert result.end_B[0] == kept
    np.testing.assert_array_equal(result.tokens_BG[0, :kept], final[prompts.shape[1] :])
    assert (result.tokens_BG[0, kept:] == EOS).all()
    assert not result.commit_step_BG[0, kept:].any()
    np.testing.assert_array_equal(rebuilt_trace(result, prompts[0], 0)[:, : len(final)], trace[:, : len(final)])
    golden(case)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "block_confidence" in case.arrays], ids=lambda case: case.name
)
def test_the_filter_gives_the_recorded_logits(case: Case) -> None:
    filter_ = recorded_filter(case)
    seen_NB, logits_NB = case.arrays["block_confidence"], case.arrays["filter_logits"]
    ours_NB = nnx.merge(filter_.graphdef, filter_.params)(jnp.asarray(np.nan_to_num(seen_NB)))
    np.testing.assert_allclose(np.where(np.isnan(logits_NB), np.nan, ours_NB), logits_NB, atol=1e-5)


@pytest.mark.parametrize("name", ["l2p_eot_tau0.5_truncates_late", "prefix_tau0.5_truncates", "dual_tau0.5_truncates"])
def test_prompts_of_many_cases_in_one_batch(name: str) -> None:
    """Under the settings and the filter of one case, whose recorded run is one of the rows."""
    case = next(case for case in CASES if case.name == name)
    prompts = [other.arrays["prompt"][0].tolist() for other in CASES]
    alone = [decoder(case)([prompt]) for prompt in prompts]
    batch = decoder(case, batch_size=len(prompts))(prompts)
    for row, single in enumerate(alone):
        for field in ("tokens_BG", "commit_step_BG", "nfe_B", "end_B"):
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(single, field)[0], err_msg=field)
    assert len(set(batch.nfe_B.tolist())) > 3
    assert len(set(batch.end_B.tolist())) > 3
    recorded = next(row for row, other in enumerate(CASES) if other is case)
    assert batch.nfe_B[recorded] == len(case.arrays["trace"])
