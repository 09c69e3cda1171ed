"""Filters of Learn2PD on disk: safetensors with torch's names and axes, or an Orbax checkpoint of the same arrays."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dllm_jax import hosts, remote
from dllm_jax.checkpoints import elsewhere, files, store
from dllm_jax.checkpoints.load import ASSETS, PARAMS
from dllm_jax.errors import UsageError
from dllm_jax.models.filter import ConfidenceFilter, FilterConfig

SAFETENSORS = "filter.safetensors"
_NAME = re.compile(r"linear([1-9]\d*)\.(weight|bias)")


class Filter(NamedTuple):
    """A filter ready to run."""

    config: FilterConfig
    graphdef: Any
    params: nnx.State


def load_filter(path: str | Path) -> Filter:
    """Loads a filter.

    Args:
        path: a safetensors file, a folder with one (what `train.filter` writes), an Orbax checkpoint, or the name of a
            bundled filter.

    Raises:
        UsageError: there is none, it is damaged, or its arrays are no filter.
    """
    place = resolve_filter(path)
    return from_arrays(_read(place), source=f"filter.path: {place}")


def resolve_filter(path: str | Path) -> Path:
    """The file or folder of a filter given as one or as the name of a bundled one; what exists wins.

    Raises:
        UsageError: neither.
    """
    if remote.is_remote(path):
        return elsewhere.copied(str(path), field="filter.path")
    if Path(path).exists():
        return Path(path)
    bundled = sorted(file.parent.name for file in ASSETS.glob(f"*/{SAFETENSORS}"))
    if str(path) not in bundled:
        raise UsageError(f"filter.path: expected a file, a folder or one of {', '.join(bundled)}, got {str(path)!r}")
    return ASSETS / path


def from_arrays(arrays: Mapping[str, Any], *, source: str = "filter_params") -> Filter:
    """A filter from its arrays.

    Args:
        arrays: linear1.weight [width, B], linear1.bias [width], linear2.weight ..., float; axes as in torch.
        source: where they come from, for errors.

    Raises:
        UsageError: names or shapes do not make a filter.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array.astype(np.float32)).all():
            raise UsageError(f"{source}: expected {name} to hold finite floating-point numbers, got {array.dtype}")
    shapes = {name: array.shape for name, array in arrays.items()}
    config = _config(shapes, source=source)
    wanted: dict[str, tuple[int, ...]] = {}
    for number, (inputs, outputs) in enumerate(config.layer_sizes, 1):
        wanted |= {f"linear{number}.weight": (outputs, inputs), f"linear{number}.bias": (outputs,)}
    if shapes != wanted:
        raise UsageError(f"{source}: expected the arrays of a filter {_listed(wanted)}, got {_listed(shapes)}")
    module = ConfidenceFilter(config, rngs=nnx.Rngs(0))
    for number, layer in enumerate(module.layers, 1):
        layer.kernel[...] = jnp.asarray(arrays[f"linear{number}.weight"].T, jnp.float32)
        assert layer.bias is not None
        layer.bias[...] = jnp.asarray(arrays[f"linear{number}.bias"], jnp.float32)
    return Filter(config, *nnx.split(module))


def to_arrays(params: nnx.State) -> dict[str, np.ndarray]:
    """The parameters of a `ConfidenceFilter` by torch's names and axes; the inverse of `from_arrays`."""
    arrays = {}
    for index, layer in params["layers"].items():
        arrays[f"linear{index + 1}.weight"] = np.ascontiguousarray(np.asarray(layer["kernel"][...]).T)
        arrays[f"linear{index + 1}.bias"] = np.asarray(layer["bias"][...])
    return arrays


def save_filter(folder: Path, params: nnx.State) -> None:
    """Writes a filter into a folder twice: `filter.safetensors`, and an Orbax checkpoint in `params`.

    Several processes all come here.
    """
    arrays = to_arrays(params)
    if hosts.is_first():
        save_file(arrays, folder / SAFETENSORS)
    store.save_params(folder / PARAMS, hosts.everywhere({name: jnp.asarray(array) for name, array in arrays.items()}))


def _read(place: Path) -> dict[str, Any]:
    """The arrays in a file or folder."""
    if place.is_dir() and not (place / SAFETENSORS).exists():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            return _read_orbax(place / PARAMS if (place / PARAMS).exists() else place)
        place = files[0]
    elif place.is_dir():
        place = place / SAFETENSORS
    try:
        return load_file(place)
    except (OSError, SafetensorError, LookupError, AttributeError) as error:  # the last two: a dtype that NumPy lacks
        raise UsageError(f"filter.path: expected a complete safetensors file, got {place}: {error}") from None


def _read_orbax(folder: Path) -> dict[str, Any]:
    try:
        stored = store.stored_params(folder)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for name, leaf in stored.items()}
        return dict(store.restore_params(folder, wanted, limit=files.IN_FLIGHT_BYTES))
    except UsageError as error:
        raise UsageError(f"filter.path: {error}") from None


def _config(shapes: Mapping[str, tuple[int, ...]], *, source: str) -> FilterConfig:
    """The filter that arrays of these shapes may be."""
    layers = [int(match[1]) for name in shapes if (match := _NAME.fullmatch(name))]
    first = shapes.get("linear1.weight", ())
    if len(first) != 2 or not all(first):
        raise UsageError(f"{source}: expected linear1.weight with two axes, got {_listed(shapes)}")
    width, block_length = first
    return FilterConfig(block_length, num_layers=max(layers), width=width if max(layers) > 1 else FilterConfig.width)


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "nothing"
