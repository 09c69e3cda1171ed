"""Every policy ends within the forwards it says a row can need, whatever the model says; failed rows harm no other."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float

from dllm_jax import load_model
from dllm_jax.checkpoints import filters
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.models.model import Model, with_causal_block
from dllm_jax.models.transformer import Transformer, TransformerConfig
from dllm_jax.settings import (
    DREAM_ORDERS,
    POLICY_FITS,
    AdaptiveSettings,
    ApdSettings,
    CladSettings,
    DawnSettings,
    DecodeSettings,
    DicoSettings,
    EditSettings,
)
from tests.decoding.blocks import FDV2, SDAR, masked
from tests.traces import EOS, GOLDENS, MASK

CHECKPOINTS, LLADA = GOLDENS / "checkpoints", "llada-tiny-gqa"
GEN_LENGTH, BLOCK_LENGTH, ONLY, BAD_ROW = 16, 8, 7, 1
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=5 + 4 * seed).tolist() for seed in range(3)]
AS_IT_IS, EQUAL, NAN, MASK_SUREST, ONE_TOKEN, ONLY_MASK, ONLY_EOS, NAN_ROW = range(8)  # what the model says
POLICIES = (*(policy for policy in POLICY_FITS), "leftright")
SPREAD = [  # rows whose open range moves, grows, or is chosen
    ("threshold", LLADA, {"blocks": "sliding", "cache": "sliding"}),
    ("klass", LLADA, {"blocks": "sliding"}),
    ("low_confidence", LLADA, {"blocks": "growing", "cache": "sliding"}),
    ("threshold", LLADA, {"blocks": "adaptive", "cache": "dual"}),
    ("entropy_threshold", LLADA, {"blocks": "pipelined"}),
    ("threshold", LLADA, {"stop": "eot+settled"}),
]
IN_BLOCKS = [  # models that are causal by blocks; the last one's logits are shifted
    ("dynamic", SDAR, {"cache": "block", "stop": "block_eos"}),
    ("edit", SDAR, {"cache": "block"}),
    ("dico", SDAR, {"cache": "block"}),
    ("threshold", FDV2, {"cache": "block", "sub_block_length": 4, "gen_length": 17}),
]
PLAIN = {"cache": "none", "stop": "none", "temperature": 0.0}


class Adversary(Transformer):
    """The model with other logits; which ones is a parameter, so that a policy is compiled once."""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.says = nnx.Param(jnp.zeros((), jnp.int32))

    def unembed(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = super().unembed(hidden_BTD)
        token_11V = jnp.arange(logits.shape[-1])[None, None]

        def only(token: int) -> Array:
            return jnp.where(token_11V == token, 0.0, -jnp.inf)

        is_bad_B = jnp.arange(len(logits))[:, None, None] == BAD_ROW
        said = (
            logits,
            0.0,
            jnp.nan,
            jnp.where(token_11V == MASK, 30.0, logits),
            only(ONLY),
            only(MASK),
            only(EOS),
            jnp.where(is_bad_B & (token_11V == 40), jnp.nan, logits),
        )
        return jax.lax.select_n(self.says[...], *(jnp.broadcast_to(x, logits.shape) for x in said))


@functools.cache
def adversary(checkpoint: str) -> Model:
    model = masked(load_model(CHECKPOINTS / checkpoint))
    if model.config.block_causal:
        model = with_causal_block(model, BLOCK_LENGTH)
    module = nnx.eval_shape(lambda: Adversary(model.config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(module)
    return dataclasses.replace(model, graphdef=graphdef)


@functools.cache
def verifier() -> Model:
    return load_model(CHECKPOINTS / "qwen2-tiny")


def saying(what: int, checkpoint: str) -> Model:
    model = adversary(checkpoint)
    params = jax.tree.map(lambda x: x, model.params)
    params["says"] = nnx.Param(jnp.int32(what))
    return dataclasses.replace(model, params=params)


def decoded(policy: str, what: int, checkpoint: str, **settings: Any) -> tuple[DecodeResult, int]:
    """Three rows and an idle one, and the bound."""
    usual = {"gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH, "batch_size": 4} | PLAIN
    given = usual | ({"cache": "window"} if policy in ("apd", "leftright") else {}) | settings
    steps = GEN_LENGTH // 2 if policy in DREAM_ORDERS else 0
    config = Config(
        decode=DecodeSettings(policy="apd" if policy == "leftright" else policy, steps=steps, **given),
        apd=ApdSettings(kv_window=3, max_lookahead=6, tokens_per_step=2 if policy == "leftright" else 0),
        dico=DicoSettings(max_divide_steps=2),
        edit=EditSettings(threshold=0.6, editing_threshold=0.0, max_post_steps=2),  # it never agrees with itself
        dawn=DawnSettings(layers=2),
        clad=CladSettings(layers=2),
        adaptive=AdaptiveSettings(delimiters="7,40"),
    )
    sizes = {"linear1": (4, BLOCK_LENGTH), "linear2": (BLOCK_LENGTH, 4)}
    arrays = {f"{name}.weight": np.full(size, 0.1, np.float32) for name, size in sizes.items()}
    arrays |= {f"{name}.bias": np.zeros(size[0], np.float32) for name, size in sizes.items()}
    filter_ = filters.from_arrays(arrays) if policy == "learn2pd" else None
    beside = {"verifier": verifier() if policy == "apd" else None, "filter": filter_}
    decoder = Decoder(saying(what, checkpoint), config, **beside)
    result = decoder(PROMPTS)
    return result, int(decoder.engine(20).most_forwards)


@pytest.mark.parametrize(
    ("policy", "checkpoint", "settings"),
    [
        *((policy, LLADA, {}) for policy in POLICIES),
        ("threshold", LLADA, {"temperature": 0.8, "top_p": 0.5}),
        ("threshold", LLADA, {"cache": "dual"}),
        ("low_confidence", LLADA, {"stop": "eot"}),
        ("entropy", LLADA, {"temperature": 0.8}),
        ("wino", LLADA, {"temperature": 0.8}),
        *SPREAD,
        *IN_BLOCKS,
    ],
    ids=str,
)
def test_no_model_makes_a_policy_run_on(policy: str, checkpoint: str, settings: dict[str, Any]) -> None:
    clean, most = decoded(policy, AS_IT_IS, checkpoint, **settings)
    assert set(clean.finish_reason) <= {"eos", "eot_id", "length"}
    assert (clean.nfe_B <= most).all()
    for what in (EQUAL, MASK_SUREST, ONE_TOKEN, ONLY_EOS):
        result, _ = decoded(policy, what, checkpoint, **settings)
        assert "error" not in result.finish_reason, what
        assert (result.nfe_B > 0).all(), what
        assert (result.nfe_B <= most).all(), what
        assert not result.masks_left_B.any(), what
        assert not (result.tokens_BG == MASK).any(), what
        if what == ONE_TOKEN:
            assert (result.tokens_BG == ONLY).all()
        if what == ONLY_EOS:
            assert not result.num_tokens_B.any()
    for what in (NAN, ONLY_MASK):
        result, _ = decoded(policy, what, checkpoint, **settings)
        assert result.finish_reason == ("error",) * 3, what
        assert (result.nfe_B == 1).all(), what
        assert not result.commit_step_BG.any(), what


@pytest.mark.parametrize(
    ("policy", "checkpoint", "settings"),
    [
        *((policy, LLADA, {}) for policy in POLICIES),
        ("threshold", LLADA, {"cache": "dual"}),
        ("dico", LLADA, {"cache": "prefix"}),
        *SPREAD,
        *IN_BLOCKS,
    ],
    ids=str,
)
def test_a_row_that_fails_harms_no_other(policy: str, checkpoint: str, settings: dict[str, Any]) -> None:
    clean, _ = decoded(policy, AS_IT_IS, checkpoint, **settings)
    harmed, _ = decoded(policy, NAN_ROW, checkpoint, **settings)
    assert harmed.finish_reason[BAD_ROW] == "error"
    for name in ("tokens_BG", "nfe_B", "commit_step_BG", "confidence_BG", "num_tokens_B"):
        for row in {0, 2}:
            np.testing.assert_array_equal(getattr(harmed, name)[row], getattr(clean, name)[row], err_msg=name)
