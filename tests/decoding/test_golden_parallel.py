"""Fourteen published rules for parallel commits reproduced step by step, and what they saw: golden section H."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from dllm_jax import load_model
from dllm_jax.config import Config, from_config_dict, to_config_dict
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.base import Commit, Policy, Sizes, View, Wants
from dllm_jax.decoding.policies.credit import Credit
from dllm_jax.decoding.policies.klass import Klass, divergence
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState
from tests.traces import MASK, Case, cases, rebuilt_trace

NAMES = {  # the published argument -> the setting
    "frechet": {"frechet_margin": "frechet.delta"},
    "klass": {
        "conf_threshold": "klass.confidence",
        "kl_threshold": "klass.divergence",
        "kl_history_length": "klass.history",
    },
    "local_leap": {
        "threshold": "local_leap.threshold",
        "relaxed_threshold": "local_leap.relaxed",
        "radius": "local_leap.radius",
    },
    "dawn": {
        "tau_induce": "dawn.relaxed",
        "tau_low": "dawn.low",
        "tau_edge": "dawn.edge",
        "tau_sink": "dawn.sink",
        "attention_layers": "dawn.layers",
    },
    "clad": {"threshold": "clad.threshold", "attention_layers": "clad.layers"},
    "r2": {
        "threshold": "r2.threshold",
        "temporal_steps": "r2.patience",
        "temporal_threshold": "r2.stable",
        "temporal_eval": "r2.stable_by",
        "confidence_cluster_size": "r2.window",
        "spatial_threshold": "r2.window_mean",
        "confidence_cluster_unmasked": "r2.window_known",
    },
    "hierarchy": {"threshold": "hierarchy.threshold", "low_threshold": "hierarchy.low"},
    "credit": {
        "threshold": "credit.threshold",
        "credit_alpha": "credit.alpha",
        "boost_gamma": "credit.gamma",
        "decay_beta": "credit.beta",
    },
    "eb": {"entropy_bound_gamma": "eb.gamma"},
    "wino": {"threshold": "wino.threshold", "threshold_back": "wino.keep"},
    "dsb": {"threshold": "threshold.value", "prefix_window": "sliding.margin", "suffix_window": "sliding.suffix"},
    "decay": {"threshold": "threshold.value", "confidence_alpha": "threshold.decay"},
    "adablock": {"threshold": "threshold.value", "delimiter_threshold": "adaptive.threshold"},
    "multi": {
        "threshold": "entropy_threshold.value",
        "block_add_threshold": "pipelined.add",
        "decoded_token_threshold": "pipelined.ready",
    },
}
POLICIES = {"dsb": "threshold", "decay": "threshold", "adablock": "threshold", "multi": "entropy_threshold"}
# Logits of two float32 implementations differ by as much as from float64, up to 1e-4 (section A).
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
DIVERGENCE_CLOSE = {"rtol": 1e-5, "atol": 4e-4}  # each of two logarithms by that of a logit and of a normalisation


def config(case: Case) -> Config:
    args, rule = case.args, case.meta["policy"]
    values = to_config_dict(Config())
    values.decode.policy = POLICIES.get(rule, rule)
    values.decode.cache, values.decode.blocks = case.meta["cache"], case.meta["blocks"]
    values.decode.gen_length = args.get("gen_length") or args["max_new_tokens"]
    values.decode.block_length = args.get("block_length") or args.get("init_block_length") or args["block_size"]
    values.decode.batch_size = 1
    for name, setting in NAMES[rule].items():
        section, field = setting.split(".")
        if args.get(name) is not None:
            values[section][field] = args[name]
    if rule == "dsb" and args["threshold"] is None:
        values.decode.policy = "low_confidence"
    if rule == "adablock":
        values.adaptive.delimiters = ",".join(map(str, args["delimiter_ids"]))
    if rule == "r2":
        values.r2.patience, values.r2.window = args["temporal_steps"] or 0, args["confidence_cluster_size"] or 0
        values.r2.runs = args["token_cluster"] is not None
    return from_config_dict(values)


TOLD: list[dict[str, np.ndarray]] = []  # what the policy saw in every forward; one list, so that cases share programs


@struct.dataclass
class Watched(Policy):
    """A policy that tells what it sees at every step."""

    policy: Policy

    @property
    def wants(self) -> Wants:
        return self.policy.wants

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Any:
        return self.policy.init(state, geometry, sizes)

    def commit(self, policy_state: Any, prediction: Prediction, view: View, noise: Noise) -> Commit:
        commit = self.policy.commit(policy_state, prediction, view, noise)
        seen = {
            "candidate": prediction.token_BQ,
            "confidence": prediction.confidence_BQ,
            "entropy": prediction.entropy_BQ,
            "block": view.block_BQ,
            "position": view.position_BQ,
            "open": view.open_BQ,
            "commit": commit.mask_BQ,
        }
        if isinstance(self.policy, Klass):
            new_BQV = jax.nn.softmax(prediction.logits_BQV, axis=-1)
            seen["divergence"] = divergence(new_BQV, policy_state.value.probability_BQV)
        if isinstance(self.policy, Credit):
            fused, _ = self.policy.fused(policy_state, prediction, view)
            seen |= {"fused_confidence": fused.confidence_BQ, "fused_candidate": fused.token_BQ}
        if view.looks is not None:
            seen |= {"attention": view.looks.rows_BQS, "attention_column_mean": view.looks.column_mean_BS}
        if view.shadow_BQ is not None:
            assert commit.retract_BQ is not None
            seen |= {"shadow_confidence": view.shadow_BQ, "remask": commit.retract_BQ & view.block_BQ & ~view.open_BQ}
        jax.debug.callback(tell, {name: x[0] for name, x in seen.items()}, ordered=True)
        return commit


def tell(seen: dict[str, Any]) -> None:
    TOLD.append(jax.tree.map(np.asarray, seen))


@pytest.mark.parametrize("case", cases("H_parallel"), ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    want, (prompt,) = case.arrays, case.arrays["prompt"]
    trace = want["trace"][:, 0]
    decoder = Decoder(load_model(case.checkpoint), config(case))
    decoder.policy = Watched(decoder.policy)
    TOLD.clear()
    result = decoder([prompt.tolist()])
    jax.effects_barrier()
    assert result.nfe_B[0] == len(TOLD) == len(trace)
    np.testing.assert_array_equal(result.tokens_BG[0], want["final"][0, len(prompt) :])
    np.testing.assert_array_equal(result.commit_step_BG[0], last_commits(trace[:, len(prompt) :]))
    if case.meta["policy"] != "wino":  # whose canvases do not follow from what stands in the end
        np.testing.assert_array_equal(rebuilt_trace(result, prompt, 0), trace)
    for step, seen in enumerate(TOLD):
        compare(case, seen, step)
    golden(case)


def last_commits(generated_SG: np.ndarray) -> list[int]:
    """The 1-based forward since which every token has stood."""
    is_mask_SG = generated_SG == MASK
    return [int(np.flatnonzero(is_mask_S).max(initial=-1)) + 2 for is_mask_S in is_mask_SG.T]


def compare(case: Case, seen: dict[str, np.ndarray], step: int) -> None:
    """What the policy saw in a forward is what the reference recorded, at the columns of the open range."""
    want, prompt_length = case.arrays, case.arrays["prompt"].shape[1]
    columns = seen["position"][seen["block"]] + prompt_length
    if "open" in want:
        np.testing.assert_array_equal(columns, np.arange(*want["open"][step]))
    for name in ("confidence", "candidate", "divergence", "fused_confidence", "fused_candidate", "entropy"):
        if name in want and case.meta["policy"] not in ("wino", "multi"):
            ours = seen[name][seen["block"]]
            close = DIVERGENCE_CLOSE if name == "divergence" else CLOSE
            np.testing.assert_allclose(ours, want[name][step][: len(ours)], **close, err_msg=f"{name}, step {step}")
    width = want["trace"].shape[2]
    if "attention_column_mean" in want:
        ours = seen["attention_column_mean"]
        np.testing.assert_allclose(ours[len(ours) - width :], want["attention_column_mean"][step], **CLOSE)
    if "attention" in want and step < len(want["attention"]):
        ours, recorded = seen["attention"][seen["block"]], want["attention"][step]
        padding = ours.shape[1] - width
        first = columns[0] if case.meta["policy"] == "clad" else 0  # keys of the block, or all of the canvas
        ours = ours[:, padding + first : padding + first + recorded.shape[1]]
        np.testing.assert_allclose(ours, recorded[: len(ours)], **CLOSE)
    if case.meta["policy"] == "wino":
        compare_shadows(case, seen, step)
    if "opened" in want:
        assert len(columns) + columns[0] - prompt_length == want["opened"][step] * case.args["block_size"]


def compare_shadows(case: Case, seen: dict[str, np.ndarray], step: int) -> None:
    """WINO's drafts, commits, shadows and what it takes back."""
    names = ("draft", "confidence", "commit", "remask", "shadow_confidence")
    want = {name: case.arrays[name][step] for name in names}
    assert seen["position"][0] == case.arrays["block"][step] * case.args["block_length"]
    np.testing.assert_array_equal(seen["candidate"], want["draft"])
    np.testing.assert_allclose(seen["confidence"], want["confidence"], **CLOSE)
    np.testing.assert_array_equal(seen["commit"], want["commit"])
    np.testing.assert_array_equal(seen["remask"], want["remask"])
    known = ~np.isnan(want["shadow_confidence"])
    np.testing.assert_array_equal(known, ~seen["open"])
    np.testing.assert_allclose(seen["shadow_confidence"][known], want["shadow_confidence"][known], **CLOSE)
