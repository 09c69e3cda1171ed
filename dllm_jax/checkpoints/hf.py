"""Reads and writes Hugging Face folders (config.json + safetensors) without torch.

Headers are read first, so every mistake in a checkpoint is reported before its gigabytes are touched; then one parameter
at a time is assembled from memory-mapped tensors and sent to its devices.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dllm_jax.checkpoints import files, layout
from dllm_jax.errors import UsageError
from dllm_jax.mesh import state_shardings
from dllm_jax.models import registry
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.transformer import TransformerConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what Hugging Face tools write
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # saved by some, needed by none

Track = Callable[[Iterable[Any]], Iterable[Any]]  # wraps an iterable, to show progress


class Tensor(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    file: Path
    offset: int
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        UsageError: the file is absent, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks header, offsets and the length of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: expected a complete safetensors file, got {error}") from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, 8 + length + fields["data_offsets"][0], fields["dtype"], tuple(fields["shape"]))
        for name, fields in header.items()
    }


def read_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, in one file or in several with an index.

    Raises:
        UsageError: no weights, a missing or broken file, or an index that disagrees with its files.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index = folder / INDEX
    if not index.exists():
        raise UsageError(f"{folder}: expected {SINGLE} or {INDEX}, got neither")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UsageError(f"{index}: expected a weight_map from tensors to files, got {type(weight_map).__name__}")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    if absent:
        raise UsageError(f"{index}: expected all its files in the folder, got none for {files.abbreviate(absent)}")
    headers = {shard: read_header(folder / shard) for shard in shards}
    astray = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in headers[shard]]
    if astray:
        raise UsageError(f"{index}: expected every tensor in its file, got none for {files.abbreviate(astray)}")
    unlisted = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return unlisted | {name: headers[shard][name] for name, shard in weight_map.items()}


def check_tensors(
    folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], *, what: str = "tensors"
) -> None:
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
    told = [f"{len(names)} {problem}: {files.abbreviate(names)}" for problem, names in problems.items() if names]
    if told:
        raise UsageError(f"{folder}: expected the {what} that config.json describes, got {'; '.join(told)}")


def read_tensors(folder: Path, config: TransformerConfig) -> dict[str, list[Tensor]]:
    """Our parameter path -> its tensors, all present and of the right shape; no weights are read.

    Raises:
        UsageError: the folder does not hold exactly the tensors its config.json describes, or in dtypes we do not know.
    """
    found = {name: tensor for name, tensor in read_headers(folder).items() if not name.endswith(BUFFERS)}
    names = registry.tensor_names(config)
    params = layout.flatten(abstract_model(config, dtype=np.dtype(np.float32))[1])
    expected = {
        name: shape
        for path, tensors in names.items()
        for name, shape in zip(tensors, layout.tensor_shapes(path, params[path].shape), strict=True)
    }
    check_tensors(folder, expected, {name: tensor.shape for name, tensor in found.items()})
    odd = [f"{name} ({tensor.dtype})" for name, tensor in found.items() if tensor.dtype not in DTYPES]
    if odd:
        raise UsageError(f"{folder}: expected tensors in {', '.join(DTYPES)}, got {files.abbreviate(odd)}")
    return {path: [found[name] for name in tensors] for path, tensors in names.items()}


def stored_dtype(folder: Path, config: TransformerConfig) -> np.dtype:
    """The dtype that holds every tensor of a folder exactly: theirs, unless they differ."""
    tensors = read_tensors(folder, config)
    return np.dtype(jax.numpy.result_type(*{DTYPES[t.dtype] for ts in tensors.values() for t in ts}))


def read_params(
    folder: Path, config: TransformerConfig, *, wanted: Mapping[str, jax.ShapeDtypeStruct], track: Track = iter
) -> dict[str, jax.Array]:
    """Reads a model's parameters, one at a time, into the shapes, dtypes and shardings wanted.

    Args:
        folder: with config.json and safetensors.
        config: what its config.json says.
        wanted: by parameter path; every value has a sharding.
        track: wraps the paths that are looped over, to show progress.

    Raises:
        UsageError: see `read_tensors`.
    """
    tensors = read_tensors(folder, config)
    params = {}
    for path in track(list(wanted)):
        mapped = [tensor.map() for tensor in tensors[path]]
        array = layout.fuse(path, mapped, shape=wanted[path].shape, dtype=wanted[path].dtype)
        params[path] = jax.make_array_from_callback(array.shape, wanted[path].sharding, array.__getitem__)
    return params
