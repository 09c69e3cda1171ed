"""Dream: Qwen2's tensors, a bidirectional model, logits shifted by one when decoding."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax.api import logits
from dllm_jax.checkpoints import layout
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.settings import DecodeSettings, ThresholdSettings
from tests.checkpoints.folders import same_bits, tensors, with_fields
from tests.traces import EOS, GOLDENS, MASK

TINY, WIDE, QWEN2 = (GOLDENS / "checkpoints" / name for name in ("dream-tiny", "dream-tiny-wide", "qwen2-tiny"))
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=7 + 4 * seed).tolist() for seed in range(3)]


def decoder(model: Model, **settings: object) -> Decoder:
    decode = DecodeSettings(**{"gen_length": 16, "block_length": 8, "batch_size": 4} | settings)
    return Decoder(model, Config(decode=decode, threshold=ThresholdSettings(value=0.5)))


def test_config() -> None:
    config = load_model(TINY).config
    assert (config.family, config.causal, config.logit_shift, config.qkv_bias) == ("Dream", False, 1, True)
    assert (config.mask_id, config.eos_id, config.tied_embeddings) == (MASK, EOS, False)


def test_a_missing_mask_token_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"config\.json: expected the field.s. mask_token_id, got none"):
        load_model(with_fields(TINY, tmp_path / "m", mask_token_id=None))


def test_every_position_sees_every_other() -> None:
    model = load_model(WIDE)
    tokens = np.array([PROMPTS[1]])
    changed = tokens.copy()
    changed[0, -1] = (tokens[0, -1] + 1) % 290
    assert np.abs(logits(model, tokens)[0, 0] - logits(model, changed)[0, 0]).max() > 1e-3


def test_a_window_over_a_fresh_cache_equals_the_full_forward() -> None:
    model = load_model(TINY)
    module = nnx.merge(model.graphdef, model.params)
    tokens = jnp.array([PROMPTS[2]] * 2)
    positions, real_BS = jnp.arange(15)[None].repeat(2, axis=0), jnp.ones((2, 15), bool)
    whole, cache = module(tokens, positions, real_BS=real_BS)
    start_B, rows = np.array([3, 8]), np.arange(2)[:, None]
    columns = start_B[:, None] + np.arange(6)
    part, _ = module(
        tokens[rows, columns], jnp.asarray(columns), real_BS=real_BS, cache=cache, start=jnp.asarray(start_B)
    )
    np.testing.assert_allclose(part, whole[rows, columns], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [TINY, WIDE], ids=lambda path: path.name)
def test_to_orbax_and_back_bit_for_bit(source, tmp_path) -> None:
    convert(source, tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(source), tensors(tmp_path / "hf"))
    assert load_model(tmp_path / "orbax").config == load_model(source).config


@pytest.mark.parametrize(("fsdp", "tensor", "parts"), [(1, 2, 2), (2, 4, 4)])
def test_tokens_do_not_depend_on_the_mesh(fsdp: int, tensor: int, parts: int) -> None:
    model = load_model(TINY, mesh=make_mesh(fsdp=fsdp, tensor=tensor))
    bias = layout.flatten(model.params)["layers.1.attention.qkv_bias"]
    assert bias.size == parts * bias.addressable_shards[0].data.size  # two KV heads: copied for four devices
    ours, alone = (decoder(m, policy="threshold", cache="dual")(PROMPTS) for m in (model, load_model(TINY)))
    np.testing.assert_array_equal(ours.tokens_BG, alone.tokens_BG)
    np.testing.assert_array_equal(ours.commit_step_BG, alone.commit_step_BG)


def test_an_autoregressive_model_cannot_be_decoded() -> None:
    with pytest.raises(UsageError, match=r"model\.path: expected a masked diffusion model, got the qwen2 model"):
        decoder(load_model(QWEN2))
