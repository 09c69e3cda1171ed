"""DiCo's released decoder (JustTheice/DiCo) step by step: once on recorded predictions, once with its model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies import dico
from dllm_jax.decoding.policies.dico_log import PHASES
from dllm_jax.decoding.policies.dico_seeds import Block
from dllm_jax.settings import DecodeSettings, DicoSettings, OutputSettings
from tests.dico_play import play
from tests.traces import MASK, Case, cases

CASES = cases("dico")
FORWARDS = 96  # more than any case has
NAMES = {
    "exploration_N": "num_seeds",
    "max_exploration_steps": "max_divide_steps",
    "tolerance_M": "tolerance",
    "exploration_threshold": "seed_threshold",
    "acceleration_low_threshold": "low_threshold",
    "acceleration_parallel_method": "parallel_rule",
    "acceleration_factor": "factor",
    "acceleration_threshold": "high_threshold",
    "R_gate": "gate",
    "mopup_margin_threshold": "margin",
    "mopup_speed": "finalize_tokens",
    "TG_alpha": "alpha",
    "TG_beta": "beta",
    "max_weight": "max_weight",
    "exploration_seed_method": "seed_method",
}


def dico_settings(case: Case) -> DicoSettings:
    args = case.args
    weighting = args["positional_weights_type"]
    weighting = args["weight_function_type"] if weighting == "ratio" else weighting
    return DicoSettings(weighting=weighting, **{ours: args[theirs] for theirs, ours in NAMES.items()})


def padded_length(case: Case) -> int:
    """The generation in whole blocks; what the last one has too much is EoS from the beginning."""
    return len(case.arrays["final"]) - len(case.arrays["prompt"])


def on_canvas(case: Case, name: str) -> np.ndarray:
    """Recorded values of the blocks' positions [F, B] at their place in the generation, [FORWARDS, G]."""
    values_FB = case.arrays[name]
    placed = np.zeros((FORWARDS, padded_length(case)), values_FB.dtype)
    for forward, block in enumerate(case.arrays["block"]):
        placed[forward, block * values_FB.shape[1] :][: values_FB.shape[1]] = values_FB[forward]
    return placed


def forwards(case: Case) -> list[dict[str, Any]]:
    """Phase, seeds and clusters of every forward, in generated positions."""
    first = len(case.arrays["prompt"])

    def present(values: np.ndarray) -> list:
        return (values[values >= 0].reshape(-1, *values.shape[1:]) - first).tolist()

    names = ("phase", "seeds", "clusters_before", "clusters_after")
    return [
        {"phase": PHASES[phase]} | {name: present(values) for name, values in zip(names[1:], arrays, strict=True)}
        for phase, *arrays in zip(*(case.arrays[name] for name in names), strict=True)
    ]


def commit_step(case: Case) -> np.ndarray:
    """For every generated position the forward that committed it, from 1; 0 where none did."""
    commit_FG = on_canvas(case, "commit")
    return np.where(commit_FG.any(axis=0), commit_FG.argmax(axis=0) + 1, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_decision_is_the_references(case: Case, golden: Callable[[Case], None]) -> None:
    block_length, length = case.args["block_length"], padded_length(case)
    policy = dico.build(dico_settings(case), block_length=block_length, gen_length=length, mask_id=MASK, traced=False)
    got = play(
        policy,
        on_canvas(case, "confidence"),
        on_canvas(case, "margin"),
        block_length=block_length,
        token_FG=on_canvas(case, "token"),
        is_open_G=np.arange(length) < case.args["gen_length"],
    )
    assert got["forwards"] == forwards(case)
    np.testing.assert_array_equal(got["commit_step_G"], commit_step(case))
    assert got["nfe"] == case.meta["n_forwards"]
    assert got["forwards_by_phase"] == case.meta["forwards_per_phase"]
    golden(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_are_the_references(case: Case) -> None:
    block_length, length = case.args["block_length"], padded_length(case)
    made = dico.build(dico_settings(case), block_length=block_length, gen_length=length, mask_id=MASK, traced=False)
    step_G = commit_step(case)
    for weight_Q, nfe in zip(case.arrays["weight"], np.flatnonzero(case.arrays["phase"] == 0), strict=True):
        open_G = (np.arange(length) < case.args["gen_length"]) & ((step_G == 0) | (step_G > nfe))
        open_Q = open_G[case.arrays["block"][nfe] * block_length :][:block_length]
        zero, values_Q = np.int32(0), np.zeros(block_length, np.float32)
        block = Block(open_Q, values_Q, values_Q, open_Q, np.int32((~open_G).sum()), np.int32(nfe), nfe == 0, zero)
        ours_Q = np.asarray(made.weighting(made.trajectory, block))
        np.testing.assert_allclose(ours_Q[open_Q], weight_Q[open_Q], atol=1e-5)


def decoder(case: Case, *, batch_size: int) -> Decoder:
    args = case.args
    decode = DecodeSettings(
        policy="dico",
        gen_length=args["gen_length"],
        block_length=args["block_length"],
        cfg_scale=args["cfg_scale"],
        batch_size=batch_size,
    )
    config = Config(decode=decode, dico=dico_settings(case), output=OutputSettings(trace=True))
    made = Decoder(load_model(str(case.checkpoint)), config)
    made.length_multiple = 128  # few shapes
    return made


def seeds_as_sets(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [step | {"seeds": set(step["seeds"])} for step in told]


WITH_MODEL = [case for case in CASES if not case.args["temperature"] and padded_length(case) == case.args["gen_length"]]


@pytest.mark.parametrize("case", WITH_MODEL, ids=lambda case: case.name)
def test_the_run_of_the_model_is_the_references(case: Case, golden: Callable[[Case], None]) -> None:
    prompt = case.arrays["prompt"].tolist()
    result = decoder(case, batch_size=1)([prompt])
    np.testing.assert_array_equal(result.tokens_BG[0], case.arrays["final"][len(prompt) :])
    np.testing.assert_array_equal(result.commit_step_BG[0], commit_step(case))
    assert result.nfe_B[0] == case.meta["n_forwards"]
    told = result.log.row(0)
    assert told["forwards_by_phase"] == case.meta["forwards_per_phase"]
    assert seeds_as_sets(told["forwards"]) == seeds_as_sets(forwards(case))
    golden(case)


def test_rows_of_a_batch_are_in_different_phases_and_equal_their_single_runs() -> None:
    recorded = [case for case in CASES if case.name in ("a_script_g64_b64_n8", "g_prompt41")]
    assert dico_settings(recorded[0]) == dico_settings(recorded[1])
    own = [np.random.default_rng(seed).integers(0, 290, size=8 + 9 * seed).tolist() for seed in range(3)]
    prompts = [case.arrays["prompt"].tolist() for case in recorded] + own
    together = decoder(recorded[0], batch_size=len(prompts))(prompts)
    told = [together.log.row(row)["forwards"] for row in range(len(prompts))]
    for row, case in enumerate(recorded):
        np.testing.assert_array_equal(together.commit_step_BG[row], commit_step(case))
        assert seeds_as_sets(told[row]) == seeds_as_sets(forwards(case))
    alone = decoder(recorded[0], batch_size=1)
    for row, prompt in enumerate(prompts):
        single = alone([prompt], rows=[row])
        for name in ("tokens_BG", "commit_step_BG", "nfe_B"):
            np.testing.assert_array_equal(getattr(together, name)[row], getattr(single, name)[0], err_msg=name)
        assert told[row] == single.log.row(0)["forwards"]
    side_by_side = zip(*([step["phase"] for step in steps] for steps in told), strict=False)
    assert set(map(len, map(set, side_by_side))) >= {2, 3}  # phases in one iteration
