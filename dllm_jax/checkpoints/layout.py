"""Parameters by name, and how our fused ones correspond to the tensors of a Hugging Face checkpoint, both ways.

torch stores a Linear as [out, in]; ours are [in, out], with q, k, v and gate, up side by side (`models/layers.py`).
"""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dllm_jax.checkpoints.files import abbreviate
from dllm_jax.errors import UsageError
from dllm_jax.models.transformer import TransformerConfig

INPUTS = {"qkv": (0,), "out": (0, 1, 2), "gate_up": (0,), "down": (0,), "head": (0,)}  # axes that a matrix sums over
COPIED_ROWS = 64  # rows of a tensor transposed together: few enough for the processor's cache, twice as fast as all


class Part(NamedTuple):
    """What one Hugging Face tensor is within one of our parameters."""

    view: np.ndarray  # the elements inside our array, in the order of the tensor
    shape: tuple[int, ...]  # of the tensor


def parts(path: str, array: np.ndarray) -> list[Part]:
    """Takes one of our parameters apart without copying; writing to the views assembles it.

    Args:
        path: name of the parameter ("layers.0.attention.qkv"); its last part tells the kind.
        array: the parameter.

    Returns:
        One part per tensor, in the order of `registry.tensor_names`. Query head n is [n // G, n % G] of the view, so it
        reads key/value head n // G.
    """
    match path.rpartition(".")[2]:
        case "qkv":  # [D, K, G + 2, H]
            heads = np.moveaxis(array, 0, -1)
            return [
                Part(view, (math.prod(view.shape[:-1]), array.shape[0]))
                for view in (heads[:, :-2], heads[:, -2], heads[:, -1])
            ]
        case "qkv_bias":  # [K, G + 2, H]
            return [Part(view, (view.size,)) for view in (array[:, :-2], array[:, -2], array[:, -1])]
        case "out":  # [K, G, H, D]
            return [Part(np.moveaxis(array, -1, 0), (array.shape[-1], math.prod(array.shape[:-1])))]
        case "gate_up":  # [D, 2, F]
            return [Part(array[:, i].T, array[:, i].T.shape) for i in range(2)]
        case "down" | "head":  # [F, D], [D, V]
            return [Part(array.T, array.T.shape)]
        case "embedding" | "scale":
            return [Part(array, array.shape)]
    raise ValueError(f"no layout is known for the parameter {path}")


def tensor_shapes(path: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the Hugging Face tensors that make up a parameter of the given shape."""
    return [part.shape for part in parts(path, np.broadcast_to(np.int8(0), shape))]


def fuse(path: str, tensors: list[np.ndarray], *, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Our parameter, assembled from its tensors and cast on the way."""
    array = np.empty(shape, dtype)
    for part, tensor in zip(parts(path, array), tensors, strict=True):
        source = tensor.reshape(part.view.shape)
        step = max(1, COPIED_ROWS * len(source) // len(tensor))
        for start in range(0, len(source), step):
            part.view[start : start + step] = source[start : start + step]
    return array


def split(path: str, array: np.ndarray) -> list[np.ndarray]:
    """The Hugging Face tensors of a parameter, contiguous."""
    return [np.ascontiguousarray(part.view.reshape(part.shape)) for part in parts(path, array)]


def spread(kind: str, array: Array, *, groups: int, copies: int) -> Array:
    """An attention parameter with its key/value heads copied, as `transformer.on_mesh` says; others as they are.

    Args:
        kind: the last part of the parameter's name.
        array: made for a configuration without copies.
        groups: query heads of every copy.
        copies: of every key/value head.
    """
    if copies == 1:
        return array

    def dealt(query: Array) -> Array:
        """[..., K, G, H] to [..., K * copies, groups, H]."""
        *before, kv_heads, given, head_dim = query.shape
        query = jnp.pad(query, [*[(0, 0)] * (query.ndim - 2), (0, groups * copies - given), (0, 0)])
        return query.reshape(*before, kv_heads * copies, groups, head_dim)

    match kind:
        case "qkv" | "qkv_bias" | "qkv_scale":
            return jnp.concatenate(
                [dealt(array[..., :-2, :]), jnp.repeat(array[..., -2:, :], copies, axis=-3)], axis=-2
            )
        case "out":
            return jnp.moveaxis(dealt(jnp.moveaxis(array, -1, 0)), 0, -1)
    return array


def stacked(kind: str, array: Array) -> Array:
    """One layer's parameter with its axes in the order that stacked ones have (`models/layers.py`)."""
    match kind:
        case "qkv":
            return jnp.moveaxis(array, 0, -1)
        case "gate_up":
            return jnp.moveaxis(array, 0, -2)
    return array


def check_shapes(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compares names and shapes.

    Raises:
        UsageError: naming everything missing, unexpected and of the wrong shape.
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} (expected {list(shape)}, got {list(found[name])})"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    told = [f"{len(names)} {problem}: {abbreviate(names)}" for problem, names in problems.items() if names]
    if told:
        raise UsageError(f"{folder}: expected the tensors that config.json describes, got {'; '.join(told)}")


def settled(config: TransformerConfig, stored: Collection[str]) -> TransformerConfig:
    """The configuration with what config.json may not say, by the names of the parameters that are stored.

    The head is tied to the embedding if none is stored; matrices that have scales are in 8 bits.
    """
    tied = config.tied_embeddings
    quantize = "int8" if any(name.endswith("_scale") for name in stored) else ""
    return dataclasses.replace(
        config, tied_embeddings="head" not in stored if tied is None else tied, quantize=quantize
    )


def flatten(state: nnx.State) -> dict[str, Any]:
    """The leaves of a state of parameters (arrays, abstract arrays, shardings) by path: "layers.0.attention.qkv"."""
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


def unflatten(abstract: nnx.State, leaves: dict[str, Any]) -> nnx.State:
    """The state of the given structure with its leaves taken by path: the inverse of `flatten`."""
    flat = ((path, param.replace(leaves[".".join(map(str, path))])) for path, param in nnx.to_flat_state(abstract))
    return nnx.from_flat_state(flat)
