"""The loops of newer models reproduced call by call: golden section M."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dllm_jax import load_model
from dllm_jax.config import Config, from_config_dict, to_config_dict
from dllm_jax.decoding.generate import Decoder
from dllm_jax.models.model import Model
from tests.traces import EOS, MASK, Case, carries, cases

CASES = [case for case in cases("M_models") if "logits" not in case.name]
QUICK = {  # in the default tier: one of every kind of loop; every one of the others compiles programs of its own, too
    "llada20_T0.8_topk20_topp0.9_noise",
    "llada20_thr0.9_eos_early_stop",
    "llada20_thr0.9_steps4_p13",
    "llada21_thr0.5_edit0.3_post4_p13",
    "llada2_sgl_joint_thr0.7_edit0.5_penalty0.4",
    "sdar_dynamic0.85_b8_stops",
    "sdar_gen_sequential_b4_topk1",
    "sdarmoe_dynamic0.9_b4_p14",
    "fdv2_b8_s4_thr0.9_p13_blockcache",
    "fdv2_batch3_b8_s4_thr0.9",
    "lladamoe_g24_b8_s12_batch2_leftpad",
    "illada_g32_b8_s16",
}


@functools.cache
def model(path: Path) -> Model:
    """The checkpoint; configurations of releases do not name their mask."""
    loaded = load_model(path)
    if loaded.config.mask_id is not None:
        return loaded
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, mask_id=MASK))


def config(case: Case) -> Config:
    args, family = case.meta["arguments"], case.meta["family"]
    values = to_config_dict(Config())
    decode = values.decode
    decode.batch_size = 1
    decode.cache = "block" if "call_kind" in case.arrays else "none"
    decode.block_length = args.get("block_length") or args.get("block_size") or args["block"]
    decode.gen_length = args.get("gen_length") or args["max_new_tokens"]
    blocks = -(-decode.gen_length // decode.block_length)
    if args.get("top_k") != 1:  # 1: greedy, at temperature 1
        decode.top_k, decode.top_p = args.get("top_k") or 0, args.get("top_p") or 1.0
        decode.temperature = float(args.get("temperature") or 0)
    if family == "LLaDA2.0":
        steps = args.get("steps") or args["steps_per_block"]
        decode.steps = blocks * min(steps, decode.gen_length // args.get("minimal_topk", 1))
        decode.policy, values.dynamic.threshold = "dynamic", args["threshold"]
        decode.stop = "early_eos" if args.get("eos_early_stop") else "block_eos"
        if case.meta["function"].startswith("LLaDA2Sampler"):
            decode.stop = "none"
    elif family == "LLaDA2.1" or "edit_threshold" in args:
        decode.policy, values.edit.threshold = "edit", args["threshold"]
        values.edit.editing_threshold = float(args.get("editing_threshold", args.get("edit_threshold")))
        values.edit.max_post_steps = args.get("max_post_steps") or args.get("max_post_edit_steps") or 16
        values.edit.min_tokens = args.get("num_to_transfer", 1)
        values.edit.penalty = float(args.get("penalty_lambda", 0))
        decode.stop = "block_eos" if args.get("eos_early_stop") else "none"
    elif family.startswith("LLaDA2 (SGLang"):
        decode.policy, values.threshold.value = "threshold", args["threshold"]
    elif family.startswith("SDAR"):
        rule = args.get("remasking_strategy", "")
        decode.policy = "sequential" if rule == "sequential" else "dynamic"
        values.dynamic.threshold = args.get("threshold") or args.get("confidence_threshold") or 1.0
        if rule == "low_confidence_static":
            values.dynamic.threshold = 1.0
        decode.steps, decode.stop = blocks * args["denoising_steps"], "block_eos"
    elif family == "Fast-dLLM v2":
        decode.policy, values.threshold.value = "threshold", float(args["threshold"])
        decode.sub_block_length = args["small_block_size"]
        decode.sub_block_cache = bool(args.get("use_block_cache"))
        decode.stop = "block_eos" if case.meta["function"].startswith("batch_sample") else "early_eos"
    else:
        decode.policy, decode.steps, decode.cfg_scale = "low_confidence", args["steps"], args.get("cfg_scale", 0.0)
    return from_config_dict(values)


@struct.dataclass
class BlockNoise:
    """Recorded uniform numbers of a block, or of the part of it that is open: [call that proposes, place, V]."""

    gumbel_SBV: jax.Array
    prompt_length: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, case: Case) -> "BlockNoise":
        uniform = case.arrays["uniform_noise"].astype(np.float64)
        return cls(
            gumbel_SBV=jnp.asarray(-np.log(-np.log(uniform)), jnp.float32),
            prompt_length=case.arrays["prompt"].shape[-1],
        )

    def gumbel(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array, *, vocab_size: int) -> jax.Array:
        places = self.gumbel_SBV.shape[1]
        return self.gumbel_SBV[nfe_B[:, None], (self.prompt_length + position_BQ) % places]

    def uniform(self, row_B: jax.Array, nfe_B: jax.Array, position_BQ: jax.Array) -> jax.Array:
        return jnp.zeros(position_BQ.shape)


def rows(case: Case) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Prompt, final canvas and canvas after every call, without padding, of every row of a case."""
    arrays = case.arrays
    prompts = np.atleast_2d(arrays["prompt"])
    finals, traces = np.atleast_2d(arrays["final"]), arrays["trace"].reshape(len(arrays["trace"]), len(prompts), -1)
    for row, prompt in enumerate(prompts):
        pad = int((arrays["attention_mask"][row] == 0).sum()) if "attention_mask" in arrays else 0
        length = arrays["prompt_len"][row] if "prompt_len" in arrays else len(prompt)
        yield prompt[pad:length].tolist(), finals[row, pad:], traces[:, row, pad:]


def ours(decoder: Decoder, prompt: list[int]) -> tuple[np.ndarray, int]:
    """The canvas of a prompt after every forward [nfe, columns], from the prompt on, and one past the row's end."""
    engine = decoder.engine(len(prompt))
    with decoder.computing():
        state = decoder.start([prompt], [0], engine.geometry)
        pad, canvases = int(state.pad_B[0]), []
        for carry in carries(engine, state):
            if int(carry.state.nfe_B[0]) > len(canvases):
                canvases.append(np.asarray(carry.state.tokens_BL[0, pad:]))
            assert int(carry.state.nfe_B[0]) == len(canvases)
    assert not carry.state.failed_B[0]
    return np.stack(canvases), int(carry.state.end_B[0]) - pad


def is_lockstep(case: Case) -> bool:
    """Whether rows wait for each other: a call of the batch need not be one of the row."""
    return len(np.atleast_2d(case.arrays["prompt"])) > 1 and "steps" not in case.meta["arguments"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name) for case in CASES],
)
def test_every_call_leaves_the_canvas_of_the_reference(case: Case, golden: Callable[[Case], None]) -> None:
    settings = config(case)
    stops = case.meta["arguments"].get("stopping_criteria_idx")
    decoder = Decoder(model(case.checkpoint), settings, end_ids=tuple(stops) if stops else None)
    if "uniform_noise" in case.arrays:
        decoder.noise = BlockNoise.of(case)
    for prompt, final, trace in rows(case):
        canvases, end = ours(decoder, prompt)
        asked = len(prompt) + settings.decode.gen_length
        if is_lockstep(case):
            # Rows with shorter prompts go on with the longest one there, and stay at what they are once they are done.
            (ends,) = np.nonzero(final[len(prompt) : asked] == EOS)  # behind the first one all is EoS at last
            width = min(end, asked, int((final >= 0).sum()), *(len(prompt) + 1 + ends[:1]))
            made = canvases[-1, :width] != MASK
            assert np.array_equal(canvases[-1, :width][made], final[:width][made])
            assert made.sum() >= width - settings.decode.block_length
            seen = np.unique(np.where(trace[:, :width] == -1, MASK, trace[:, :width]), axis=0)
            assert all((canvas[:width][None] == seen).all(axis=1).any() for canvas in canvases)
            continue
        assert len(canvases) == len(trace) == case.arrays["nfe"]
        for canvas, wanted in zip(canvases, trace, strict=True):
            width = min(int((wanted >= 0).sum()), len(canvas))
            first_behind = asked if settings.decode.sub_block_length else width
            width = min(width, first_behind)  # a first token behind all that was asked for
            assert np.array_equal(canvas[:width], wanted[:width])
    golden(case)


def test_all_kinds_of_loops_are_here() -> None:
    families = {case.meta["family"].split(" (")[0] for case in CASES}
    assert families >= {"LLaDA2.0", "LLaDA2.1", "LLaDA2", "LLaDA-MoE", "iLLaDA", "SDAR", "Fast-dLLM v2"}
    assert len(CASES) > 50
    assert {case.name for case in CASES} >= QUICK
    kinds: Any = {config(case).decode.policy for case in CASES}
    assert kinds == {"dynamic", "sequential", "edit", "threshold", "low_confidence"}
