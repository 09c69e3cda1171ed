"""Parameters by name, and how our fused ones correspond to the tensors of a Hugging Face checkpoint, both ways.

torch stores a Linear as [out, in]; ours are [in, out], with q, k, v and gate, up side by side (`models/layers.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dllm_jax.checkpoints.files import abbreviate
from dllm_jax.errors import UsageError
from dllm_jax.models.transformer import TransformerConfig

EXPERTS = ("expert_gate", "expert_up", "expert_down")  # parameters that hold a matrix of every expert
JOINABLE = {"qkv": (0,), "out": (0, 1, 2), "gate_up": (0,), "down": (0,), "head": (0,)}
INPUTS = JOINABLE | dict.fromkeys(EXPERTS, (1,))  # axes that a matrix sums over
BIAS = "router_bias"  # a parameter whose dtype may be another than the model's
COPIED_ROWS = 64  # rows of a tensor transposed together: few enough for the processor's cache, twice as fast as all
JOB_ELEMENTS = 2**21  # in the rows of a tensor that are copied by one job
ALIGNMENT = 64  # bytes; the CPU devices of JAX take an array that starts at a multiple of it as it is, without a copy

Index = tuple[slice, ...]  # a part of an array: one slice per axis
Job = Callable[[], None]


class Source(Protocol):
    """A tensor of a checkpoint: an array, or one that is read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""

    def __getitem__(self, box: Index, /) -> np.ndarray:
        """A part of it."""


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
        case "down" | "head" | "router":  # [F, D], [D, V], [D, E]
            return [Part(array.T, array.T.shape)]
        case "expert_gate" | "expert_up" | "expert_down":  # [E, D, F], [E, F, D]
            return [Part(one.T, one.T.shape) for one in array]
        case "embedding" | "scale" | "router_bias":
            return [Part(array, array.shape)]
    raise ValueError(f"no layout is known for the parameter {path}")


def tensor_shapes(path: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the Hugging Face tensors that make up a parameter of the given shape."""
    return [part.shape for part in parts(path, np.broadcast_to(np.int8(0), shape))]


def fuse(
    path: str,
    tensors: Sequence[Source],
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: Index | None = None,
    run: Callable[[Job], Any] = lambda job: job(),
) -> np.ndarray:
    """Our parameter or a part of it, assembled from its tensors, of which only what belongs to the part is read.

    Args:
        path: name of the parameter.
        tensors: in the order of `registry.tensor_names`.
        shape: of the whole parameter.
        dtype: of the result; rows are cast as they are copied.
        index: of the part in the parameter; None is the whole.
        run: takes every job that copies some rows, to run it at once or elsewhere; the jobs do not touch each other.

    Returns:
        The part, complete when all jobs have run.
    """
    index = index or (slice(None),) * len(shape)
    if path.rpartition(".")[2] in EXPERTS:  # those of the part, whose tensors are others
        tensors = tensors[index[0]]
        shape, index = (len(tensors), *shape[1:]), (slice(None), *index[1:])
    array = _empty(tuple(len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)), dtype)
    boxes = tensor_boxes(path, shape, index)
    for part, tensor, box in zip(parts(path, array), tensors, boxes, strict=True):
        count = len(part.view)
        rows = (box[0].stop - box[0].start) // count  # of the tensor, to one of the view
        step = max(1, JOB_ELEMENTS // (rows * math.prod(tensor.shape[1:])))
        for start in range(0, count, step):
            stop = min(start + step, count)
            cut = slice(box[0].start + start * rows, box[0].start + stop * rows)
            run(functools.partial(_copy, part.view[start:stop], tensor, (cut, *box[1:])))
    return array


def _copy(target: np.ndarray, tensor: Source, box: Index) -> None:
    source = tensor[box]
    step = max(1, COPIED_ROWS * len(target) // len(source))
    source = source.reshape(target.shape)
    for start in range(0, len(target), step):
        target[start : start + step] = source[start : start + step]


def tensor_boxes(path: str, shape: tuple[int, ...], index: Index) -> list[Index]:
    """Where the elements of a part of a parameter are in each of its tensors.

    Args:
        path: name of the parameter.
        shape: of the whole parameter.
        index: of the part.

    Returns:
        One slice per axis of every tensor. Which they are follows from `parts`, by where the views of the part begin
        in the views of the whole.

    Raises:
        ValueError: a part that is not one piece of a tensor.
    """
    whole = np.empty(shape, np.int8)  # never touched, so it takes no memory
    boxes = []
    for part, piece in zip(parts(path, whole), parts(path, whole[index]), strict=True):
        view, cut = part.view, piece.view
        offset = cut.ctypes.data - view.ctypes.data
        starts = [0] * view.ndim
        for axis in sorted((axis for axis in range(view.ndim) if view.shape[axis] > 1), key=lambda i: -view.strides[i]):
            starts[axis], offset = divmod(offset, view.strides[axis])
        boxes.append(_merged(list(zip(starts, cut.shape, view.shape, strict=True)), part.shape))
    return boxes


def _merged(axes: list[tuple[int, int, int]], shape: tuple[int, ...]) -> Index:
    """The slices of a tensor, of whose axes each is several of a view: (start, size of the part, size of the whole)."""
    box = []
    for length in shape:
        start, last, size, product = 0, 0, 1, 1
        while product < length:
            first, part, whole = axes.pop(0)
            start, last = start * whole + first, last * whole + first + part - 1
            size, product = size * part, product * whole
        if last - start + 1 != size:
            raise ValueError(f"expected a part that is one piece of the tensor {shape}, got {size} elements of an axis")
        box.append(slice(start, last + 1))
    return tuple(box)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory is aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def whole_shapes(path: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's tensors by name, where one tensor may be several of `tensor_shapes` in a row.

    They lie behind each other in it: as its rows, those of different experts along an axis of their own.
    """
    whole: dict[str, tuple[int, ...]] = {}
    for name, group in itertools.groupby(zip(names, shapes, strict=True), key=lambda pair: pair[0]):
        own = [shape for _, shape in group]
        if len(own) == 1:
            whole[name] = own[0]
        elif path.rpartition(".")[2] in EXPERTS:
            whole[name] = (len(own), *own[0])
        else:
            whole[name] = (sum(shape[0] for shape in own), *own[0][1:])
    return whole


def split(path: str, array: np.ndarray) -> list[np.ndarray]:
    """The Hugging Face tensors of a parameter, contiguous."""
    return [np.ascontiguousarray(part.view.reshape(part.shape)) for part in parts(path, array)]


def joined(kind: str, tensors: Sequence[Array], config: TransformerConfig) -> Array:
    """A matrix of one layer, or the head, from its Hugging Face tensors, inside a program: `fuse` does it with files.

    Args:
        kind: the last part of the parameter's name.
        tensors: [out, in] each, in the order of `registry.tensor_names`.
        config: of the model; copies of key/value heads are not made here.
    """
    match kind:
        case "qkv":
            shape = (config.num_kv_heads, -1, config.head_dim, config.embed_dim)
            if len(tensors) == 1:  # all in one
                heads = (config.num_heads, config.num_kv_heads)
                ends = [config.head_dim * count for count in itertools.accumulate(heads)]
                tensors = jnp.split(tensors[0], ends)
            return jnp.moveaxis(jnp.concatenate([tensor.reshape(shape) for tensor in tensors], axis=1), -1, 0)
        case "out":
            return tensors[0].T.reshape(config.num_kv_heads, -1, config.head_dim, config.embed_dim)
        case "gate_up":
            return jnp.stack([tensor.T for tensor in tensors], axis=1)
        case "down" | "head":
            return tensors[0].T
    raise ValueError(f"no layout is known for the matrix {kind}")


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


def stack_place(path: str, *, apart: int) -> tuple[str, int | None]:
    """Where stacked layers hold a parameter of one: its name, and the index in its first axis; None: it is of no layer.

    Args:
        path: "layers.3.attention.qkv", or one that belongs to no layer.
        apart: layers in front of the stack (`TransformerConfig.apart`), which are a stack of their own.
    """
    first, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    if first != "layers":
        return path, None
    layer = int(number)
    return (f"first.{rest}", layer) if layer < apart else (f"layers.{rest}", layer - apart)


def stacked(kind: str, array: Array) -> Array:
    """One layer's parameter with its axes in the order that stacked ones have (`models/layers.py`)."""
    match kind:
        case "qkv":
            return jnp.moveaxis(array, 0, -1)
        case "gate_up":
            return jnp.moveaxis(array, 0, -2)
    return array


def unstacked(kind: str, array: Array) -> Array:
    """The inverse of `stacked`."""
    match kind:
        case "qkv":
            return jnp.moveaxis(array, -1, 0)
        case "gate_up":
            return jnp.moveaxis(array, -2, 0)
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


def settled(config: TransformerConfig, stored: Mapping[str, Any]) -> TransformerConfig:
    """The configuration with what config.json may not say, by the dtypes of the parameters that are stored.

    The head is tied to the embedding if none is stored; matrices that have scales are in 8 bits; the biases of routers
    stay in float32 if they are stored so.
    """
    tied, experts = config.tied_embeddings, config.experts
    quantize = "int8" if any(name.endswith("_scale") for name in stored) else ""
    biases = {str(dtype) for name, dtype in stored.items() if name.endswith(BIAS)}
    if experts and biases:
        experts = dataclasses.replace(experts, bias_dtype="float32" if "float32" in biases else "")
    tied = "head" not in stored if tied is None else tied
    return dataclasses.replace(config, tied_embeddings=tied, quantize=quantize, experts=experts)


def flatten(state: nnx.State) -> dict[str, Any]:
    """The leaves of a state of parameters (arrays, abstract arrays, shardings) by path: "layers.0.attention.qkv"."""
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


def unflatten(abstract: nnx.State, leaves: dict[str, Any]) -> nnx.State:
    """The state of the given structure with its leaves taken by path: the inverse of `flatten`."""
    flat = ((path, param.replace(leaves[".".join(map(str, path))])) for path, param in nnx.to_flat_state(abstract))
    return nnx.from_flat_state(flat)
