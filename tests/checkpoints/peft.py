"""Adapter folders for tests as PEFT writes them, and what they make of a model's tensors, by numpy."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints.folders import Tensors, tensors, with_tensors

RANK = 4
PREFIX = "base_model.model."
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # A [r, in] and B [out, r] by the names of matrices


def drawn(model: Path, parts: Collection[str], *, seed: int = 0) -> Pairs:
    """Random factors, different for every matrix whose name ends in one of the parts."""
    random = np.random.default_rng(seed)
    return {
        name.removesuffix(".weight"): (
            random.standard_normal((RANK, tensor.shape[1]), np.float32) / 8,
            random.standard_normal((tensor.shape[0], RANK), np.float32) / 8,
        )
        for name, tensor in tensors(model).items()
        if any(name.endswith(f"{part}.weight") for part in parts)
    }


def named(pairs: Pairs) -> Tensors:
    """The tensors of an adapter's file."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": value
        for name, pair in pairs.items()
        for letter, value in zip("AB", pair, strict=True)
    }


def written(target: Path, factors: Mapping[str, np.ndarray], **fields: Any) -> Path:
    """A folder with the tensors given; `fields` of its configuration, None removes one."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "target_modules": ["any"]} | fields
    target.mkdir(parents=True)
    save_file(dict(factors), target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def changed(model: Path, target: Path, pairs: Pairs, *, scale: float) -> Path:
    """A copy of a model in float32 with W + scale * B A, tensor by tensor."""

    def change(edited: Tensors) -> None:
        for name in edited:
            edited[name] = edited[name].astype(np.float32)
        for name, (a, b) in pairs.items():
            edited[f"{name}.weight"] += np.float32(scale) * (b @ a)

    return with_tensors(model, target, change)
