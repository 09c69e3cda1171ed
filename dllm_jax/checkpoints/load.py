"""Loads a model: a Hugging Face folder, a converted folder, or a bundled checkpoint, straight onto a mesh."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dllm_jax.checkpoints import files, hf, layout
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh, state_shardings
from dllm_jax.models.model import Model, abstract_model

ASSETS = Path(__file__).parent.parent / "assets"
DTYPES = ("auto", "keep", "float32", "bfloat16", "float16", "float64")


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint given as a folder or as the name of a bundled one; an existing folder wins.

    Raises:
        UsageError: neither.
    """
    if str(path) and Path(path).is_dir():
        return Path(path)
    bundled = sorted(config.parent.name for config in ASSETS.glob("*/config.json"))
    if str(path) not in bundled:
        raise UsageError(f"model.path: expected a folder or one of {', '.join(bundled)}, got {str(path)!r}")
    return ASSETS / path


def load_model(
    path: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None, verify: bool = True, track: hf.Track = iter
) -> Model:
    """Loads a checkpoint of any known family; no array is ever whole on a device that holds only a part of it.

    Args:
        path: a Hugging Face or converted folder, or the name of a bundled checkpoint.
        dtype: of weights and activations; "auto" is float32 on CPU, else bfloat16; "keep" is the checkpoint's own.
        mesh: where the weights go (default: the first device).
        verify: compare the checksums of a converted checkpoint with its manifest first.
        track: wraps the parameters read from a Hugging Face folder, to show progress.

    Raises:
        UsageError: no such checkpoint, a broken one, or an unknown dtype.
    """
    folder = resolve(path)
    config = files.read_config(folder)
    mesh = make_mesh(data=1) if mesh is None else mesh
    platform = mesh.devices.flat[0].platform
    kind = _dtype(dtype, platform, folder, config)
    if platform == "gpu" and kind.itemsize == 2:
        config = dataclasses.replace(config, attention_kernel="cudnn")
    graphdef, abstract = abstract_model(config, dtype=kind)
    shardings = layout.flatten(state_shardings(abstract, mesh))
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in layout.flatten(abstract).items()
    }
    params = hf.read_params(folder, config, wanted=wanted, track=track)
    return Model(config, graphdef, layout.unflatten(abstract, params), mesh, str(folder))


def _dtype(name, platform, folder, config):
    if name not in DTYPES:
        raise UsageError(f"model.dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "keep":
        return hf.stored_dtype(folder, config)
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
