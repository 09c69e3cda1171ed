"""Weights in 8 bits: how near they are, that products use them, and that every way to get them gives the same."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jax.checkpoints import convert as convert_command
from dllm_jax.checkpoints import hf, layout
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.layers import Storage, multiply
from dllm_jax.models.presets import PRESETS
from dllm_jax.models.quantize import quantized
from dllm_jax.models.transformer import Transformer
from dllm_jax.settings import DecodeSettings, ModelSettings
from tests.checkpoints.folders import GQA, TINY

MATRICES = ("qkv", "out", "gate_up", "down", "head")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_value_is_within_half_a_step(seed: int, size: float) -> None:
    matrix = np.random.default_rng(seed).normal(scale=size, size=(5, 7, 3)).astype(np.float32)
    values, scale = quantized(jnp.asarray(matrix), axes=(0, 2))
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (jnp.int8, (5, 7, 3), jnp.float32, (7,))
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[None, :, None]
    assert np.all(np.abs(back - matrix) <= np.asarray(scale)[None, :, None] * (0.5 + 1e-6))
    np.testing.assert_array_equal(np.abs(values).max(axis=(0, 2)), 127)  # of every channel the largest


def test_a_channel_of_zeros_stays_zero() -> None:
    values, scale = quantized(jnp.zeros((4, 2)), axes=(0,))
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_products_are_those_with_the_dequantized_matrix(dtype: jnp.dtype) -> None:
    storage = Storage(dtype=jnp.float32, rngs=nnx.Rngs(0), quantize="int8")
    matrix, scale = storage.matrix({"mlp": 256, "embed": 8}, inputs=["mlp"])
    assert scale is not None
    whole = matrix[...].astype(jnp.float32) * scale[...][None]
    x = 100 * jax.random.normal(jax.random.key(0), (2, 3, 256)).astype(dtype)  # times 127: too much for float16
    got = multiply("btf,fd->btd", x, matrix, scale)
    want = jnp.einsum("btf,fd->btd", x.astype(jnp.float32), whole)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2 if dtype != jnp.float32 else 1e-5, atol=0.3)


def test_all_ways_give_the_same_weights(tmp_path: Path) -> None:
    """From a Hugging Face folder, from a converted one, as a conversion, and on a mesh with copied heads."""
    loaded = load_model(GQA, quantize="int8")
    params = {name: np.asarray(param) for name, param in layout.flatten(loaded.params).items()}
    kinds = {name.rpartition(".")[2]: param.dtype for name, param in params.items()}
    assert {kind for kind, dtype in kinds.items() if dtype == np.int8} == set(MATRICES)
    assert kinds["embedding"] == kinds["scale"] == kinds["qkv_scale"] == np.float32
    stored = convert(GQA, tmp_path / "whole", to="orbax", dtype="keep", overwrite=False)
    eighth = convert(GQA, tmp_path / "int8", to="orbax", dtype="keep", overwrite=False, quantize="int8")
    assert eighth.dtype == stored.dtype == "float32"
    for model in (load_model(tmp_path / "whole", quantize="int8"), load_model(tmp_path / "int8")):
        assert model.config == loaded.config
        for name, param in layout.flatten(model.params).items():
            np.testing.assert_array_equal(param, params[name], err_msg=name)
    for folder, quantize in ((GQA, "int8"), (tmp_path / "int8", "")):
        spread = layout.flatten(load_model(folder, quantize=quantize, mesh=make_mesh(data=2, tensor=4)).params)
        assert spread["layers.0.attention.qkv"].addressable_shards[0].data.shape == (64, 1, 3, 16)
        assert spread["layers.0.attention.qkv_scale"].addressable_shards[0].data.shape == (1, 3, 16)
        np.testing.assert_array_equal(
            spread["layers.0.attention.qkv"][:, :, 0], params["layers.0.attention.qkv"][:, :, :2].reshape(64, 4, 16)
        )
        np.testing.assert_array_equal(spread["layers.1.mlp.down"], params["layers.1.mlp.down"])


def test_tokens_do_not_depend_on_the_mesh(tmp_path: Path) -> None:
    config = Config(
        decode=DecodeSettings(policy="threshold", cache="dual", gen_length=32, block_length=8, batch_size=4)
    )
    prompts = [np.random.default_rng(seed).integers(0, 290, size=9 + seed).tolist() for seed in range(4)]
    one = Decoder(load_model(TINY, quantize="int8"), config)(prompts)
    sharded = load_model(TINY, quantize="int8", mesh=make_mesh(data=2, fsdp=2, tensor=2))
    other = Decoder(sharded, config)(prompts)
    np.testing.assert_array_equal(one.tokens_BG, other.tokens_BG)
    np.testing.assert_array_equal(one.commit_step_BG, other.commit_step_BG)
    whole = Decoder(load_model(TINY), config)(prompts)
    assert 0 < np.mean(one.tokens_BG == whole.tokens_BG) < 1  # it is another model, if only just


def test_a_checkpoint_of_bfloat16_is_half_as_large_in_8_bits() -> None:
    shape = dataclasses.replace(PRESETS["llada_8b"], num_layers=2)

    def size(**fields: str) -> int:
        config = dataclasses.replace(shape, **fields)
        model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        return sum(leaf.size * leaf.dtype.itemsize for name, leaf in layout.flatten(nnx.state(model)).items())

    layers = 2 * 218_112_000
    rows = shape.vocab_size * shape.embed_dim
    assert size() == pytest.approx(2 * layers + 4 * rows, rel=1e-3)
    assert size(quantize="int8") == pytest.approx(layers + 3 * rows, rel=1e-3)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"model\.quantize: expected one of '', 'int8', got 'int4'"):
        load_model(TINY, quantize="int4")
    with pytest.raises(UsageError, match=r"model\.quantize: expected one of , int8, got 'int4'"):
        Decoder(load_model(TINY), Config(model=ModelSettings(quantize="int4")))
    with pytest.raises(UsageError, match="model: expected weights that are not quantized, got int8"):
        hf.export_hf(load_model(TINY, quantize="int8"), tmp_path / "new")
    command = ["convert", f"--source={TINY}", f"--target={tmp_path / 'new'}", "--to=hf", "--quantize=int8"]
    assert convert_command.main(command) == 2
    assert capsys.readouterr().err == "error: --quantize: expected none with --to=hf, got int8\n"
    assert not list(tmp_path.iterdir())
