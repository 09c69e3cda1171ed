"""Models that are causal by blocks, and what their tests share: rows, and results that are to be equal."""

import dataclasses
import functools
from typing import Any

import numpy as np

from dllm_jax import load_model
from dllm_jax.checkpoints import filters
from dllm_jax.config import Config, from_config_dict, to_config_dict
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.models.model import Model
from tests.traces import GOLDENS, MASK

SDAR, FDV2 = "sdar-tiny-b", "fdv2-tiny-tied"  # two layers each; the second one's logits are shifted
BLOCK, PART, GEN = 8, 4, 16
LENGTHS = (3, 8, 17, 10, 20, 13, 22, 15)  # all remainders, a prompt shorter than a block and one of exactly one
PROMPTS = [np.random.default_rng(length).integers(0, 290, size=length).tolist() for length in LENGTHS]
FIELDS = ("tokens_BG", "commit_step_BG", "nfe_B", "end_B", "num_tokens_B", "masks_left_B")
NUMBERS = {  # with which the rules act on these models
    "threshold.value": 0.6,
    "dynamic.threshold": 0.6,
    "edit.threshold": 0.6,
    "edit.editing_threshold": 0.3,
    "edit.max_post_steps": 3,
    "klass.confidence": 0.3,
    "klass.divergence": 0.1,
    "local_leap.threshold": 0.7,
    "local_leap.relaxed": 0.4,
    "r2.window_mean": 0.5,
    "credit.threshold": 0.7,
    "dawn.layers": 2,
    "clad.layers": 2,
    "clad.threshold": 0.5,
    "dico.max_divide_steps": 2,
    "hierarchy.low": 0.3,  # 0.4 is 2e-6 away from one of the confidences
}


@functools.cache
def model(checkpoint: str) -> Model:
    """The checkpoint; not every configuration names the mask."""
    return masked(load_model(GOLDENS / "checkpoints" / checkpoint))


def masked(loaded: Model) -> Model:
    """The model with the mask of the tiny checkpoints."""
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, mask_id=MASK))


def config(policy: str, **decode: Any) -> Config:
    """Settings; names with a section are others than those of the decode."""
    values = to_config_dict(Config())
    for name, value in (NUMBERS | {name: value for name, value in decode.items() if "." in name}).items():
        section, field = name.split(".")
        values[section][field] = value
    given = {name: value for name, value in decode.items() if "." not in name}
    values.decode.update({"policy": policy, "gen_length": GEN, "block_length": BLOCK, "batch_size": 8} | given)
    return from_config_dict(values)


def decoder(checkpoint: str | Model, policy: str, *, end_ids: tuple[int, ...] | None = None, **decode: Any) -> Decoder:
    """For prompts of any length in one bucket."""
    chosen = model(checkpoint) if isinstance(checkpoint, str) else checkpoint
    companions = {"filter": a_filter()} if policy == "learn2pd" else {}
    made = Decoder(chosen, config(policy, **decode), end_ids=end_ids, **companions)
    made.length_multiple = 64
    return made


def a_filter() -> Any:
    """A filter of Learn2PD that accepts what is surer than its neighbours."""
    arrays = {"linear1.weight": np.eye(BLOCK, dtype=np.float32) * 4, "linear2.weight": np.eye(BLOCK, dtype=np.float32)}
    arrays |= {f"linear{i}.bias": np.full(BLOCK, -1.0 * (i == 2), np.float32) for i in (1, 2)}
    return filters.from_arrays(arrays)


def assert_rows(got: DecodeResult, want: DecodeResult, *, row: int, place: int = 0) -> None:
    """A row of a result is one of another."""
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(got, field)[row], getattr(want, field)[place], err_msg=f"{field} {row}")
    assert got.finish_reason[row] == want.finish_reason[place]


def order(result: DecodeResult) -> np.ndarray:
    """The place of every position's forward among those that committed something in its row, from 0; -1: none did."""
    return np.stack([np.unique([0, *steps], return_inverse=True)[1][1:] - 1 for steps in result.commit_step_BG])
