"""decode.plan for TPUs that are not here: libtpu compiles LLaDA-8B, with few layers of its true width."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from dllm_jax.bench.plan import program_arguments, topology_devices
from dllm_jax.checkpoints.load import tuned
from dllm_jax.chips import TPUS
from dllm_jax.config import Config
from dllm_jax.decoding import driver
from dllm_jax.decoding.generate import Decoder
from dllm_jax.memory import chip, device_bytes
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import shape_model
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import DecodeSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"),
]
ROOT = Path(__file__).parents[2]
GIB = 2**30
LAYER, HEAD = 218_112_000, 126464 * 4096  # parameters; the embedding is as large as the head
LLADA = {
    "model_type": "llada",
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 2,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "block_type": "llama",
}


LLADA2_MINI = {
    "model_type": "llada2_moe",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 6e5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "vocab_size": 157184,
    "pad_token_id": 156892,
}


def plan(
    folder: Path, *settings: str, layers: int, code: int, fields: dict[str, Any] = LLADA
) -> tuple[dict[str, Any], str]:
    """The JSON and stderr of the command for a model folder that has nothing but config.json."""
    sizes = {"n_layers" if fields is LLADA else "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields | sizes))
    path = folder / "plan.json"
    flags = [
        f"--config.{setting}"
        for setting in (f"model.path={folder}", "decode.gen_length=256", f"output.path={path}", *settings)
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "decode.plan", "--config=threshold", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(path.read_text()), done.stderr


def test_llada_8b_with_a_dual_cache_on_eight_v5e(tmp_path: Path) -> None:
    results, _ = plan(tmp_path, "plan.topology=v5e:2x4", "mesh.tensor=8", "decode.cache=dual", layers=2, code=0)
    assert (results["topology"], results["chip"], results["devices"]) == ("v5e:2x4", "v5e", 8)
    assert results["mesh"] == {"data": 1, "fsdp": 1, "tensor": 8}
    assert results["memory_per_device"] == 16 * GIB
    assert results["fits"] is True
    (program,) = results["programs"]
    assert program["prompt_length"] == 256
    assert program["argument_bytes"] == pytest.approx(2 * (2 * LAYER + 2 * HEAD) / 8, rel=0.01)
    assert 0 < program["temp_bytes"] < GIB
    assert 0 < program["code_bytes"] < GIB / 4
    assert program["compile_seconds"] > 0
    full, cached = program["loops"]["full"], program["loops"]["cached"]
    for loop, columns in ((full, 512), (cached, 32)):
        activations = (1 + 2 * 2) * 8 * columns * 4096 * 2  # of the embedding and twice per layer, in bfloat16
        assert activations <= loop["collectives"]["all-reduce"]["bytes"] <= 1.01 * activations
    assert cached["weight_copies"] == 0
    assert full["bound_by"] == "matrix products"
    assert cached["bound_by"] == "weights"
    read = 2 * (2 * LAYER + HEAD) / 8 / 819e9 * 1e3
    assert read < cached["floor_ms"] < 1.2 * read


def test_what_does_not_fit_one_v5e(tmp_path: Path) -> None:
    settings = ("plan.topology=v5e:1x1", "decode.cache=dual", "decode.batch_size=512")
    results, err = plan(tmp_path, *settings, layers=4, code=1)
    assert results["fits"] is False
    assert results["programs"][0]["temp_bytes"] > 16 * GIB
    last = err.strip().splitlines()[-1]
    assert last.startswith("does not fit: with prompts of 256 tokens every device needs more than there is (argument ")
    assert "has 15.75 GiB; by estimate" in last
    assert "decode.batch_size=" in last


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_experts_are_split_without_all_to_all_or_copies(tmp_path: Path, quantize: str) -> None:
    """One sum over `tensor` for the experts of a layer and the MLP of all tokens; in 8 bits the latter has its own."""
    layers = 4
    settings = ("plan.topology=v5e:2x4", "mesh.tensor=8", "decode.cache=block", f"model.quantize={quantize}")
    results, _ = plan(tmp_path, *settings, layers=layers, code=0, fields=LLADA2_MINI)
    assert results["fits"] is True
    (program,) = results["programs"]
    experts = 3 * 256 * 3 * 2048 * 512 // 8  # on a device
    bytes_each = 1 if quantize else 2
    assert bytes_each * experts < program["argument_bytes"] < bytes_each * experts + 2 * 157184 * 2048 // 2
    for loop, columns in zip(program["loops"].values(), (256, 32), strict=True):
        assert (loop["weight_copies"], loop["cache_copies"]) == (0, 0)
        assert set(loop["collectives"]) <= {"all-reduce", "all-gather"}
        sums = 1 + 2 * layers + (layers - 1 if quantize else 0)
        activations = sums * 8 * columns * 2048 * 2
        assert activations <= loop["collectives"]["all-reduce"]["bytes"] <= 1.01 * activations


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """libtpu in this process, whatever machine it is on."""
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("dream_7b", {"cache": "none"}),
        ("llada_8b", {"cache": "none", "stop": "eot"}),
        ("dream_7b", {"cache": "prefix", "block_length": 512}),
        ("llada_8b", {"cache": "dual"}),
    ],
    ids=str,
)
def test_neither_scores_nor_all_logits_are_in_memory(preset: str, settings: dict[str, Any], alone: None) -> None:
    """Scores of the full canvas or of a block in front of a cache, logits of the generation: whatever dtype and order.

    EoTP without a cache looks at all positions, which is where those logits would come from.
    """
    devices = topology_devices("v5e:2x4")
    decode = DecodeSettings(policy="threshold", gen_length=1024, batch_size=8, **settings)
    decoder = Decoder(
        shape_model(
            tuned(dataclasses.replace(PRESETS[preset], num_layers=2), platform="tpu"),
            dtype=jnp.dtype("bfloat16"),
            mesh=make_mesh(data=1, tensor=8, devices=devices),
        ),
        Config(decode=decode),
    )
    engine = decoder.engine(1024)
    with decoder.computing():
        text = driver.decode.lower(*program_arguments(decoder, engine)).compile().as_text()
    heads, columns = decoder.model.config.stored_heads // 8, engine.geometry.columns
    assert columns % 128 == 0
    arrays = [tuple(map(int, axes.split(","))) for axes in re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", text)]
    assert len(arrays) > 100
    widths = set(engine.cache.widths(engine.geometry))
    for queries, keys in [(2048, 2048), *((width, columns) for width in widths)]:
        scores = 8 * heads * queries * keys
        assert not [axes for axes in arrays if {queries, keys} <= {*axes} and math.prod(axes) >= scores]
    assert text.count('custom_call_target="tpu_custom_call"') == len(engine.canvases) + len(widths)
    logits = 8 * 1024 * decoder.model.config.vocab_size // 8
    assert max(math.prod(axes) for axes in arrays) < logits


def test_every_generation_has_figures(alone: None) -> None:
    forms = {name: "2x2" if name in ("v5e", "v6e") else "2x2x1" for name in TPUS}
    for name, shape in forms.items():
        devices = topology_devices(f"{name}:{shape}")
        figures, usable = chip(devices), device_bytes(devices)
        assert figures
        assert figures.name == name
        assert usable
        assert usable <= figures.memory
        assert figures.memory * len(devices) >= 4 * 16 * GIB
