"""APD's released sampler (danielmisrael/apd, `apd_sample`) reproduced step by step: golden section E."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dllm_jax import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.engine import Engine
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.apd import Apd, LeftToRight, Verified
from dllm_jax.decoding.policies.base import Commit, Policy, Sizes, View, Wants
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeResult, DecodeState
from dllm_jax.settings import ApdSettings, DecodeSettings
from tests.traces import GOLDENS, Case, cases, rebuilt_trace


@struct.dataclass
class RecordedDraws:
    """The recorded noise (-log u)^T of every step's drafted tokens, all steps behind each other."""

    gumbel_RV: jax.Array
    first_S: jax.Array

    @classmethod
    def from_case(cls, case: Case) -> "RecordedDraws":
        noise = case.arrays["gumbel_noise"].astype(np.float64)
        return cls(
            gumbel_RV=jnp.asarray(-np.log(noise) / case.args["temperature"], jnp.float32),
            first_S=jnp.asarray(case.arrays["step_offsets"]),
        )

    def gumbel(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array, *, vocab_size: int) -> jax.Array:
        row_BQ = self.first_S[nfe_B][:, None] + jnp.arange(position_BQ.shape[1])[None, :]
        return self.gumbel_RV[jnp.minimum(row_BQ, len(self.gumbel_RV) - 1)]

    def uniform(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array) -> jax.Array:
        raise AssertionError("APD draws no uniform numbers")


@struct.dataclass
class Watched(Policy):
    """A policy that tells its draft and target at every step."""

    policy: Apd | LeftToRight
    tell: Callable[..., None] = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        return self.policy.wants

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Verified | tuple[()]:
        return self.policy.init(state, geometry, sizes)

    def commit(self, policy_state: Verified, prediction: Prediction, view: View, noise: Noise) -> Commit:
        drafts = [prediction.token_BQ[0]]
        if isinstance(self.policy, Apd):
            drafts.append(self.policy.verify(policy_state, prediction, view)[0][0])
        jax.debug.callback(self.tell, *drafts, ordered=True)
        return self.policy.commit(policy_state, prediction, view, noise)


def settings(case: Case) -> Config:
    args = case.args
    return Config(
        decode=DecodeSettings(
            policy="apd",
            cache="window",
            gen_length=args["max_new_tokens"],
            temperature=args["temperature"],
            top_p=args.get("top_p") or 1.0,
            batch_size=1,
        ),
        apd=ApdSettings(
            mixture_weight=args["apd_mixture_weight"] or 0.0,
            kv_window=args["kv_window"] or 0,
            max_lookahead=args["max_lookahead"] or 0,
            tokens_per_step=args["tokens_per_step"] or 0,
            target="gumbel" if case.name.startswith("coupled") else "argmax",
        ),
    )


def windows(engine: Engine, start: DecodeState, result: DecodeResult) -> np.ndarray:
    """Left, right and cursor of every step, [S, 3], as columns of the unpadded canvas."""
    geometry, found = engine.geometry, []
    commit_step_L = np.zeros(geometry.columns, np.int32)
    commit_step_L[geometry.prompt_length : geometry.length] = result.commit_step_BG[0]
    for step in range(int(result.nfe_B[0])):
        done_L = np.where(commit_step_L <= step, commit_step_L, 0)
        tokens_BL = jnp.where(jnp.asarray(done_L)[None] > 0, 0, start.tokens_BL)
        state = dataclasses.replace(
            start, tokens_BL=tokens_BL, commit_step_BL=jnp.asarray(done_L)[None], nfe_B=jnp.array([step])
        )
        start_B, end_B = engine.blocks.begin(state, engine.masked(state), geometry)
        state = dataclasses.replace(state, block_start_B=start_B, block_end_B=end_B)
        span = engine.cache.span(state, engine.slots(state).first)
        is_cached = step > 0 and engine.cache.widths(geometry)
        left = int(span.first[0]) if is_cached else 0
        found.append([left, int(span.seen_B[0]), int(start_B[0])])
    return np.maximum(np.array(found) - int(start.pad_B[0]), 0)


@pytest.mark.parametrize("case", cases("E_apd"), ids=lambda case: case.name)
def test_trace_is_the_references(case: Case, golden) -> None:
    want, (prompt,) = case.arrays, case.arrays["prompt"]
    model, verifier = (
        load_model(GOLDENS / "checkpoints" / case.meta["checkpoint"][name]) if name in case.meta["checkpoint"] else None
        for name in ("dream", "verifier")
    )
    config = settings(case)
    if config.apd.tokens_per_step:
        verifier = None
    decoder, told = Decoder(model, config, verifier=verifier), []
    decoder.policy = Watched(decoder.policy, lambda *drafts: told.append([np.asarray(draft) for draft in drafts]))
    if case.args["temperature"]:
        decoder.noise = RecordedDraws.from_case(case)
    result = decoder([prompt.tolist()])
    jax.effects_barrier()

    np.testing.assert_array_equal(rebuilt_trace(result, prompt, 0), want["trace"])
    accepted = np.bincount(result.commit_step_BG[0], minlength=len(want["trace"]) + 1)[1:]
    np.testing.assert_array_equal(accepted, want["num_accept"])
    engine = decoder.engine(len(prompt))
    span = windows(engine, decoder.start([prompt.tolist()], [0], engine.geometry), result)
    np.testing.assert_array_equal(span, np.stack([want["left_idx"], want["right_idx"], want["curr_idx"]], axis=1))
    assert len(told) == len(accepted)
    for step, (draft, *target) in enumerate(told):
        rows = slice(*want["step_offsets"][step : step + 2])
        drafted = len(want["x0"][rows])
        np.testing.assert_array_equal(draft[:drafted], want["x0"][rows])
        # Behind a step that accepted everything the reference scores the first token by a stale state.
        stale = int(step > 0 and span[step, 2] == span[step - 1, 1])
        for tokens in target:
            np.testing.assert_array_equal(tokens[stale:drafted], want["target"][rows][stale:])
    golden(case)
