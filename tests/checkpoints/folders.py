"""Checkpoint folders for tests: copies of the recorded ones, in other dtypes, or damaged on purpose; a large one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dllm_jax.checkpoints import hf
from dllm_jax.checkpoints.files import read_config
from tests.traces import GOLDENS

TINY, GQA, SHARDED = (GOLDENS / "checkpoints" / name for name in ("llada-tiny", "llada-tiny-gqa", "llada-tiny-sharded"))
Tensors = dict[str, np.ndarray]


def copied(source: Path, target: Path) -> Path:
    """A writable copy."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def tensors(folder: Path) -> Tensors:
    """Every tensor of a folder, bfloat16 too."""
    return {name: np.array(tensor.map()) for name, tensor in hf.read_headers(folder).items()}


def with_tensors(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy in which `change` has edited the dictionary of tensors, in one file."""
    copied(source, target)
    edited = tensors(source)
    change(edited)
    (target / hf.INDEX).unlink(missing_ok=True)
    save_file(edited, target / hf.SINGLE, metadata={"format": "pt"})
    return target


def with_fields(source: Path, target: Path, **fields: Any) -> Path:
    """A copy with other fields in its config.json; None removes one."""
    config = json.loads((copied(source, target) / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def one_layer(source: Path, target: Path) -> Path:
    """A copy of a LLaDA folder without all but its first layer, in a folder of its own: fast, and no good."""

    def cut(edited: Tensors) -> None:
        for name in [name for name in edited if re.search(r"blocks\.[1-9]", name)]:
            del edited[name]

    return with_fields(with_tensors(source, target / "all", cut), target / "one", n_layers=1)


def large(target: Path) -> Path:
    """A LLaDA folder of 590 MB in four files; no tensor has more than 60 MB. Its weights are noise."""
    width, mlp, vocab, layers = 1024, 4096, 14_650, 7
    sizes = {"d_model": width, "n_layers": layers, "mlp_hidden_size": mlp, "vocab_size": vocab, "embedding_size": vocab}
    fields = json.loads((TINY / "config.json").read_text()) | sizes | {"n_heads": 16, "n_kv_heads": 16}
    return noise(target, fields, dtype=np.float32, files=4)


def large_mixture(target: Path) -> Path:
    """LLaDA2.0-mini with all its tensors' names, of 0.98 GB in bfloat16 in ten files: an eighth as wide, 20 layers."""
    mini = {
        "hidden_size": 512,
        "num_hidden_layers": 20,
        "intermediate_size": 1280,
        "moe_intermediate_size": 64,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rotary_dim": 16,
        "vocab_size": 16_000,
        "max_position_embeddings": 32768,
        "pad_token_id": 15_892,
        "dtype": "bfloat16",
    }
    fields = json.loads((GOLDENS / "checkpoints" / "llada2-tiny" / "config.json").read_text()) | mini
    return noise(target, fields, dtype=ml_dtypes.bfloat16, files=10)


def noise(target: Path, fields: dict[str, Any], *, dtype: Any, files: int) -> Path:
    """A folder with the tensors that a config.json describes, dealt out to several files."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(fields))
    expected = hf.expected_tensors(read_config(target))
    named = [pair for tensors in expected.values() for pair in tensors.items()]
    random, weight_map = np.random.default_rng(0), {}
    for number in range(files):
        edited = {name: random.standard_normal(shape, np.float32).astype(dtype) for name, shape in named[number::files]}
        save_file(edited, target / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(edited, f"model-{number}.safetensors")
    (target / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target


def in_dtype(source: Path, target: Path, dtype: Any) -> Path:
    """A copy with all tensors cast."""
    return with_tensors(source, target, lambda edited: edited.update({k: v.astype(dtype) for k, v in edited.items()}))


def same_bits(one: Tensors, other: Tensors) -> bool:
    """The same names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.tobytes() == other[name].tobytes()
        for name, value in one.items()
    )


def header_names(file: Path) -> list[str]:
    """Names in one safetensors file, read by the safetensors library."""
    with safe_open(file, framework="numpy") as opened:
        return list(opened.keys())
