"""The cost model against hand-computed numbers, XLA's own count, and times measured on an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.bench.ceilings import Ceilings
from dllm_jax.bench.cost import Cost, forward_cost, layer_parameters, parameters_used, weights_cost
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.stepping import full_step
from dllm_jax.mesh import make_mesh
from dllm_jax.models.experts import ExpertSettings
from dllm_jax.models.model import random_model
from dllm_jax.models.presets import PRESETS
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.settings import DecodeSettings

SMALL = TransformerConfig(
    family="llada",
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    mlp_dim=16,
    vocab_size=10,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_length=64,
    mask_id=1,
    eos_id=0,
)
# 8 * (8 + 2 * 4) for q|k|v, 8 * 8 for the output, 3 * 8 * 16 for the MLP
LAYER = 128 + 64 + 384


def small(config: TransformerConfig = SMALL) -> Cost:
    return forward_cost(config, rows=3, columns=5, keys=7, slots=2, itemsize=4)


def test_parameters_of_a_layer() -> None:
    assert layer_parameters(SMALL) == LAYER


def test_flops_by_hand() -> None:
    attention = 2 * (3 * 5 * 7 * 8) * 2  # scores and sums: 105 pairs, width 8, a multiplication and an addition
    assert small().flops == 2 * (2 * 15 * LAYER + attention) + 2 * 3 * 2 * 80


def test_bytes_by_hand() -> None:
    weights = 2 * (LAYER + 16) + 8 + 80  # two norms a layer, the last norm, the head
    cache = 2 * 2 * 3 * (5 + 7) * 4  # layers, k and v, rows, written and read, width
    assert small().bytes == 4 * (weights + cache + 15 * 8)
    assert small(dataclasses.replace(SMALL, qkv_bias=True)).bytes - small().bytes == 4 * 2 * 16
    assert small(dataclasses.replace(SMALL, tied_embeddings=True)) == small()


def test_of_experts_those_that_are_likely_touched_are_read() -> None:
    """2 of 4 experts of width 6 for every token, and one of width 5 for all, in the second of two layers."""
    settings = ExpertSettings(count=4, per_token=2, hidden_dim=6, shared_dim=5, dense_layers=(0,))
    config = dataclasses.replace(SMALL, experts=settings)
    mixed, each = 128 + 64 + 8 * 4 + 3 * 8 * 5, 3 * 8 * 6  # attention, router, shared MLP; one expert
    assert parameters_used(config, tokens=1) == (LAYER + mixed + 2 * each, LAYER + mixed + 2 * each)
    used, read = parameters_used(config, tokens=3)
    assert (used, read) == (LAYER + mixed + 2 * each, LAYER + mixed + 3.5 * each)  # 4 (1 - (1 / 2)^3)
    assert small(config).flops - small().flops == 2 * 15 * (used - 2 * LAYER)
    less = weights_cost(config, tokens=15, itemsize=4).bytes - weights_cost(config, tokens=3, itemsize=4).bytes
    assert 0 < less < 4 * 0.5 * each


def test_devices_share_the_work() -> None:
    assert small().split(2) == Cost(small().flops / 2, small().bytes / 2)


@pytest.mark.parametrize(
    ("rows", "columns", "length", "milliseconds"),
    [(1, 512, 512, 10.4), (1, 32, 512, 5.0), (1, 2048, 2048, 43.7), (1, 32, 2048, 5.3), (8, 32, 512, 5.6)],
)
def test_floor_of_llada_8b_on_an_h100(rows: int, columns: int, length: int, milliseconds: float) -> None:
    """Worked out independently from 3.05 TB/s and 706 TFLOP/s, for full canvases and blocks of 32."""
    h100 = Ceilings(read_bytes_per_second=3.05e12, copy_bytes_per_second=2.8e12, matmul_flops_per_second=706e12)
    cost = forward_cost(PRESETS["llada_8b"], rows=rows, columns=columns, keys=length, slots=32, itemsize=2)
    assert h100.floor_seconds(cost) * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_flops_agree_with_xla() -> None:
    """Of a full step. XLA also counts what the model leaves out: norms, rotations, softmax, and the commit."""
    config = dataclasses.replace(PRESETS["llada_tiny"], num_layers=1)
    model = random_model(config, dtype=jnp.dtype("float32"), mesh=make_mesh(), seed=0)
    settings = DecodeSettings(gen_length=96, block_length=32, batch_size=1)
    decoder = Decoder(model, Config(decode=settings))
    engine = decoder.engine(32)
    state = decoder.start([[7] * 32], [0], engine.geometry)
    step = jax.jit(lambda engine, state: full_step(engine, engine.start(state), length=128)[0])
    counted = step.lower(engine, state).compile().cost_analysis()["flops"]
    cost = forward_cost(config, rows=1, columns=128, keys=128, slots=32, itemsize=4)
    assert cost.flops < counted < 1.05 * cost.flops
