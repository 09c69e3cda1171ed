"""Loads a model: a Hugging Face folder, a converted folder, or a bundled checkpoint, straight onto a mesh."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dllm_jax.checkpoints import files, foreign, hf, layout, store
from dllm_jax.checkpoints.manifest import NAME as MANIFEST
from dllm_jax.checkpoints.manifest import verify_folder
from dllm_jax.errors import UsageError
from dllm_jax.memory import bytes_per_device, check_fits
from dllm_jax.mesh import make_mesh, weight_shardings
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.transformer import TransformerConfig, on_mesh

ASSETS = Path(__file__).parent.parent / "assets"
PARAMS = "params"  # the Orbax part of a converted folder
DTYPES = ("auto", "keep", "float32", "bfloat16", "float16", "float64")


def resolve(path: str | Path, *, field: str = "model.path") -> Path:
    """The folder of a checkpoint given as a folder or as the name of a bundled one; an existing folder wins.

    Args:
        path: what the user gave; may be a folder of Hugging Face's cache, of which the result is the snapshot.
        field: the setting it came from, for the error.

    Raises:
        UsageError: neither, or a folder with stand-ins for files (git-lfs, broken links).
    """
    if os.path.isdir(path):
        folder = foreign.snapshot(Path(path), field=field)
        foreign.refuse_stand_ins(folder, field=field)
        return folder
    bundled = sorted(config.parent.name for config in ASSETS.glob("*/config.json"))
    if str(path) not in bundled:
        hint = foreign.hint(str(path))
        raise UsageError(f"{field}: expected a folder or one of {', '.join(bundled)}, got {str(path)!r}{hint}")
    return ASSETS / path


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    verify: bool = True,
    track: hf.Track = iter,
    field: str = "model.path",
) -> Model:
    """Loads a checkpoint of any known family; every device receives only its part of the weights.

    Args:
        path: a Hugging Face or converted folder, or the name of a bundled checkpoint.
        dtype: of weights and activations; "auto" is float32 on CPU, else bfloat16; "keep" is the checkpoint's own.
        mesh: where the weights go (default: the first device).
        verify: compare the checksums of a converted checkpoint with its manifest first.
        track: wraps the parameters read from a Hugging Face folder, to show progress.
        field: the setting that the path came from, for the error.

    Raises:
        UsageError: no such checkpoint, a broken one, or an unknown dtype.
    """
    folder = resolve(path, field=field)
    converted = (folder / PARAMS).exists() or (folder / MANIFEST).exists()
    if converted:
        verify_folder(folder, checksums=verify)
    foreign.refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise foreign.absent(folder, "config.json")
    config = files.read_config(folder)
    if converted:
        stored = store.stored_params(folder / PARAMS)
        config = layout.settled(config, has_head="head" in stored)
    else:
        config, tensors = hf.read_tensors(folder, config)
    mesh = make_mesh(data=1) if mesh is None else mesh
    platform = mesh.devices.flat[0].platform
    if dtype == "keep":
        kind = _stored_dtype(stored) if converted else hf.stored_dtype(tensors)
    else:
        kind = dtype_on(platform, dtype)
    graphdef, abstract = abstract_model(config, dtype=kind)
    shardings = weight_shardings(abstract, mesh)
    check_fits(bytes_per_device(abstract, shardings), mesh, field=field, got=str(path))
    wanted = layout.flatten(jax.tree.map(_placed, abstract, shardings))
    if converted:
        layout.check_shapes(folder, *({name: leaf.shape for name, leaf in tree.items()} for tree in (wanted, stored)))
        params = store.restore_params(folder / PARAMS, wanted)
    else:
        params = hf.read_params(tensors, wanted=wanted, track=track)
    model = Model(config, graphdef, layout.unflatten(abstract, params), mesh, str(folder))
    return _spread(model, on_mesh(config, mesh))


def _spread(model: Model, config: TransformerConfig) -> Model:
    """The model with the copies of key/value heads that a configuration wants."""
    if config == model.config:
        return model
    graphdef, abstract = abstract_model(config, dtype=model.dtype)
    shardings = layout.flatten(weight_shardings(abstract, model.mesh))
    params = layout.flatten(model.params)
    for path, shape in layout.flatten(abstract).items():
        if shape.shape != params[path].shape:
            spread = functools.partial(layout.spread, path, groups=config.stored_groups, copies=config.kv_copies)
            params[path] = jax.jit(spread, out_shardings=shardings[path])(params[path])
    return dataclasses.replace(model, config=config, graphdef=graphdef, params=layout.unflatten(abstract, params))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _stored_dtype(stored: Mapping[str, jax.ShapeDtypeStruct]) -> np.dtype:
    return jnp.result_type(*{leaf.dtype for leaf in stored.values()})


def dtype_on(platform: str, name: str) -> np.dtype:
    """The dtype a name stands for on a platform; "auto" is float32 on CPU, else bfloat16.

    Raises:
        UsageError: an unknown name, or one that needs x64.
    """
    if name not in DTYPES:
        raise UsageError(f"model.dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    dtype = jnp.dtype(name)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UsageError(f"model.dtype: expected at most 32 bits unless jax_enable_x64 is set, got {name}")
    return dtype
