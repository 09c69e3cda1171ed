"""What the devices of a mesh tell each other in a step, read from the partitioned program: no more than is needed."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import pytest

from dllm_jax import mesh
from dllm_jax.config import Config
from dllm_jax.decoding import driver
from dllm_jax.decoding.generate import Decoder
from dllm_jax.models import model as models
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import DecodeSettings
from tests.hlo import loop_collectives

LAYERS, WIDTH, VOCABULARY, BLOCK, BATCH, COLUMNS = 2, 128, 3968, 32, 8, 128  # vocabulary / width as LLaDA-8B has it
CONTROL = 16  # bytes: whether a row is live, and how many forwards there were
SHAPES = {  # LLaDA has as many key/value heads as heads, Dream 4 for 28
    "llada_8b": {"num_heads": 8, "num_kv_heads": 8},
    "dream_7b": {"num_heads": 28, "num_kv_heads": 4},
}


def collectives(preset: str, shape: tuple[int, int, int], *, cfg_scale: float) -> list[tuple[str, int]]:
    config = dataclasses.replace(
        PRESETS[preset],
        num_layers=LAYERS,
        embed_dim=WIDTH,
        head_dim=16,
        mlp_dim=3 * WIDTH,
        vocab_size=VOCABULARY,
        mask_id=VOCABULARY - 1,
        eos_id=0,
        other_end_ids=(),
        pad_ids=(),
        **SHAPES[preset],
    )
    data, fsdp, tensor = shape
    devices = mesh.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    decode = DecodeSettings(
        policy="threshold", cache="dual", gen_length=64, block_length=BLOCK, batch_size=BATCH, cfg_scale=cfg_scale
    )
    decoder = Decoder(
        models.random_model(config, dtype=jnp.dtype("float32"), mesh=devices, seed=0), Config(decode=decode)
    )
    engine = decoder.engine(COLUMNS - 64)
    state = decoder.start([[1] * 50] * BATCH, range(BATCH), engine.geometry)
    with decoder.computing():
        text = driver.decode.lower(engine, state).compile().as_text()
    return [(kind, size) for kind, size in loop_collectives(text) if size > CONTROL]


@pytest.mark.parametrize(
    ("preset", "shape", "cfg_scale"),
    [("llada_8b", (8, 1, 1), 1.0), ("llada_8b", (1, 8, 1), 0.0), ("dream_7b", (8, 1, 1), 0.0)],
)
def test_rows_need_nothing_from_each_other(preset: str, shape: tuple[int, int, int], cfg_scale: float) -> None:
    assert collectives(preset, shape, cfg_scale=cfg_scale) == []


@pytest.mark.parametrize(
    ("preset", "shape", "cfg_scale"),
    [
        ("llada_8b", (1, 1, 8), 0.0),
        ("llada_8b", (2, 2, 2), 1.0),
        ("dream_7b", (1, 1, 8), 0.0),
    ],
)
def test_tensor_parallelism_sums_activations(preset: str, shape: tuple[int, int, int], cfg_scale: float) -> None:
    """Two sums per layer and one for the embedding, in the full step and in the cached one; best tokens per slot."""
    found = collectives(preset, shape, cfg_scale=cfg_scale)
    rows = BATCH // (shape[0] * shape[1])
    runs = rows * (2 if cfg_scale else 1)
    step = BLOCK + (preset == "dream_7b")
    sums = Counter(size for kind, size in found if kind == "all-reduce" and size > 2 * 4 * rows * BLOCK * 2)
    assert sums == {4 * runs * columns * WIDTH: 2 * LAYERS + 1 for columns in (COLUMNS, step)}
    others = [(kind, size) for kind, size in found if size not in sums]
    assert {kind for kind, _ in others} <= {"all-reduce", "all-gather"}
    assert max(size for _, size in others) <= 4 * rows * BLOCK * (shape[2] + 1)  # a few numbers per slot


def test_split_weights_are_gathered_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "decoding_rules", lambda *_: mesh.DECODING_SPLIT)
    found = collectives("llada_8b", (1, 8, 1), cfg_scale=0.0)
    assert {kind for kind, _ in found} == {"all-gather"}
    attention, mlp = 4 * WIDTH * 3 * 8 * 16, 4 * WIDTH * 2 * 3 * WIDTH
    steps = 2  # the full one and the cached one
    # XLA on CPU gathers the smallest, the output of attention, in front of the loop all the same.
    assert Counter(size for _, size in found) == Counter([attention, mlp, mlp // 2] * LAYERS * steps)
