"""Stacked layers, as on TPUs, decode what a list of layers decodes."""

import dataclasses

import numpy as np
import pytest

from dllm_jax import load_model
from dllm_jax.checkpoints import layout, load
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.settings import ApdSettings, DecodeSettings
from tests.traces import GOLDENS

COMPARED = ("tokens_BG", "commit_step_BG", "nfe_B", "end_B")
PROMPTS = [np.random.default_rng(seed).integers(0, 290, size=5 + 4 * seed).tolist() for seed in range(4)]
ONE, MIXED = (1, 1, 1), (2, 2, 2)


def both(
    monkeypatch: pytest.MonkeyPatch, *names: str, shape: tuple[int, int, int] = ONE, quantize: str = ""
) -> tuple[list[Model], list[Model]]:
    """The models as a list of layers on one device, and stacked on a mesh."""
    data, fsdp, tensor = shape
    folders = [str(GOLDENS / "checkpoints" / name) for name in names]
    listed = [load_model(folder, quantize=quantize) for folder in folders]
    tuned = load.tuned
    monkeypatch.setattr(
        load, "tuned", lambda *args, **kwargs: dataclasses.replace(tuned(*args, **kwargs), stacked=True)
    )
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    stacked = [load_model(folder, quantize=quantize, mesh=mesh) for folder in folders]
    assert all(model.config.stacked for model in stacked)
    return listed, stacked


def assert_same(got: DecodeResult, want: DecodeResult) -> None:
    assert len(set(want.nfe_B.tolist())) > 1  # rows that finish at different iterations
    for name in COMPARED:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize(
    ("name", "cache", "stop", "shape", "quantize"),
    [
        ("llada-tiny", "none", "eot", ONE, ""),
        ("llada-tiny", "prefix", "eot", ONE, ""),
        ("llada-tiny", "dual", "eot", ONE, ""),
        ("dream-tiny", "dual", "none", MIXED, ""),
        ("llada-tiny-gqa", "dual", "none", MIXED, "int8"),
    ],
)
def test_block_decoding(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: str, stop: str, shape: tuple[int, int, int], quantize: str
) -> None:
    decode = DecodeSettings(
        policy="threshold", cache=cache, stop=stop, gen_length=32, block_length=8, batch_size=len(PROMPTS)
    )
    listed, stacked = both(monkeypatch, name, shape=shape, quantize=quantize)
    results = [Decoder(model, Config(decode=decode))(PROMPTS) for (model,) in (stacked, listed)]
    assert_same(*results)


@pytest.mark.parametrize("shape", [ONE, MIXED])
def test_windows_and_a_verifier(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """Rows write their keys and values each from a column of its own on."""
    decode = DecodeSettings(policy="apd", cache="window", gen_length=24, batch_size=len(PROMPTS), temperature=1.0)
    config = Config(decode=decode, apd=ApdSettings(mixture_weight=0.5, kv_window=8, max_lookahead=6))
    listed, stacked = both(monkeypatch, "dream-tiny", "qwen2-tiny", shape=shape)
    results = [Decoder(model, config, verifier=verifier)(PROMPTS) for model, verifier in (stacked, listed)]
    assert_same(*results)


def test_every_parameter_is_there_once_in_the_compilers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    (listed,), (stacked,) = both(monkeypatch, "llada-tiny-gqa", shape=(1, 1, 2))
    want, got = layout.flatten(listed.params), layout.flatten(stacked.params)
    layers = listed.config.num_layers
    assert len(got) < len(want)
    assert got["layers.attention.qkv"].shape == (layers, 2, 4, 16, 64)
    assert got["layers.mlp.gate_up"].shape == (layers, 2, 64, 192)
    assert got["layers.mlp.gate_up"].addressable_shards[0].data.shape == (layers, 2, 64, 96)
    assert got["layers.attention.qkv"].addressable_shards[0].data.shape == (layers, 1, 4, 16, 64)
    for layer in range(layers):
        own = {name: want[f"layers.{layer}.{name}"] for name in ("attention.qkv", "mlp.gate_up", "mlp.down")}
        np.testing.assert_array_equal(got["layers.attention.qkv"][layer], np.moveaxis(own["attention.qkv"], 0, -1))
        np.testing.assert_array_equal(got["layers.mlp.gate_up"][layer], np.moveaxis(own["mlp.gate_up"], 0, -2))
        np.testing.assert_array_equal(got["layers.mlp.down"][layer], own["mlp.down"])
