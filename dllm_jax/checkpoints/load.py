"""Loads a model: a Hugging Face folder, a converted folder, or a bundled checkpoint, straight onto a mesh."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dllm_jax import remote
from dllm_jax.checkpoints import adapters, elsewhere, files, foreign, hf, layout, store
from dllm_jax.checkpoints.assembly import Assembly
from dllm_jax.checkpoints.manifest import NAME as MANIFEST
from dllm_jax.checkpoints.manifest import verify_folder
from dllm_jax.errors import UsageError
from dllm_jax.memory import check_fits
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from dllm_jax.models.quantize import FORMATS
from dllm_jax.models.transformer import TransformerConfig, on_mesh

ASSETS = Path(__file__).parent.parent / "assets"
PARAMS = "params"  # the Orbax part of a converted folder
DTYPES = ("auto", "keep", "float32", "bfloat16", "float16", "float64")


def resolve(path: str | Path, *, field: str = "model.path") -> Path:
    """The folder of a checkpoint given as a folder or as the name of a bundled one; an existing folder wins.

    Args:
        path: what the user gave; may be a URL, or a folder of Hugging Face's cache, whose snapshot is the result.
        field: the setting it came from, for the error.

    Raises:
        UsageError: neither, or a folder with stand-ins for files (git-lfs, broken links).
    """
    if remote.is_remote(path) and not foreign.hint(str(path)):
        path = elsewhere.copied(str(path), field=field)
    if os.path.isdir(path):
        folder = foreign.snapshot(Path(path), field=field)
        foreign.refuse_stand_ins(folder, field=field)
        return folder
    bundled = sorted(config.parent.name for config in ASSETS.glob("*/config.json"))
    if str(path) not in bundled:
        hint = foreign.hint(str(path))
        raise UsageError(f"{field}: expected a folder or one of {', '.join(bundled)}, got {str(path)!r}{hint}")
    return ASSETS / path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which no weights were read yet.

    Attributes:
        folder: where it is.
        dtype: of the weights that will be read.
        assembly: what it stores and what the model wants.
        params: reads the stored parameters, by name and in the order of `assembly.shapes`; of those that are not asked
            for yet at most so many bytes are in host memory (one parameter, if that is larger).
    """

    folder: Path
    dtype: np.dtype
    assembly: Assembly
    params: Callable[[int], Iterator[tuple[str, jax.Array]]]


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    quantize: str = "",
    adapter: str | Path = "",
    mesh: Mesh | None = None,
    verify: bool = True,
    track: hf.Track = iter,
    field: str = "model.path",
) -> Model:
    """Loads a checkpoint of any known family; every device receives only its part of the weights.

    Args:
        path: a Hugging Face or converted folder, or the name of a bundled checkpoint.
        dtype: of weights and activations; "auto" is float32 on CPU, else bfloat16; "keep" is the checkpoint's own.
        quantize: "int8" for matrices in 8 bits (`models/quantize.py`); "": as the checkpoint has them.
        adapter: the folder of a LoRA adapter in PEFT's layout, merged into the weights (`checkpoints/adapters.py`).
        mesh: where the weights go (default: the first device).
        verify: compare the checksums of a converted checkpoint with its manifest first.
        track: wraps the parameters read from a Hugging Face folder, to show progress.
        field: the setting that the path came from, for the error.

    Raises:
        UsageError: no such checkpoint or adapter, a broken one, or an unknown dtype or format of quantization.
    """
    mesh = make_mesh(data=1) if mesh is None else mesh
    checkpoint = open_checkpoint(
        path, dtype=dtype, quantize=quantize, adapter=adapter, mesh=mesh, verify=verify, track=track, field=field
    )
    check_fits(checkpoint.assembly.bytes_per_device, mesh, field=field, got=str(path))
    for name, array in checkpoint.params(files.IN_FLIGHT_BYTES):
        checkpoint.assembly.add(name, array)
    return checkpoint.assembly.model(str(checkpoint.folder))


def open_checkpoint(
    path: str | Path,
    *,
    dtype: str,
    quantize: str,
    adapter: str | Path,
    mesh: Mesh,
    verify: bool,
    track: hf.Track,
    field: str,
) -> Checkpoint:
    """Reads what a checkpoint says of itself, and whether it is a model that we can build; see `load_model`."""
    check_quantize(quantize)
    folder = resolve(path, field=field)
    beside = adapters.resolve(adapter) if adapter else None
    converted = (folder / PARAMS).exists() or (folder / MANIFEST).exists()
    if converted:
        verify_folder(folder, checksums=verify)
    if not (beside and beside.samefile(folder)):
        foreign.refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise foreign.absent(folder, "config.json")
    config = files.read_config(folder)
    if converted:
        stored = store.stored_params(folder / PARAMS)
        config = layout.settled(config, {name: array.dtype for name, array in stored.items()})
    else:
        config, tensors = hf.read_tensors(folder, config)
    platform = mesh.devices.flat[0].platform
    if dtype == "keep":
        kind = stored["embedding"].dtype if converted else hf.stored_dtype(tensors)
    else:
        kind = dtype_on(platform, dtype)
    wanted = on_mesh(tuned(config, platform=platform, quantize=quantize), mesh)
    assembly = Assembly(config, wanted, dtype=kind, mesh=mesh)
    if converted:
        trees = (assembly.shapes, stored)
        layout.check_shapes(folder, *({name: leaf.shape for name, leaf in tree.items()} for tree in trees))

    change = adapters.open_adapter(beside, config) if beside else None
    shapes = change.before(assembly.shapes) if change else assembly.shapes

    def stored_as(limit: int) -> Iterator[tuple[str, jax.Array]]:
        if converted:
            return store.restore_params(folder / PARAMS, shapes, limit=limit)
        return hf.read_params(tensors, wanted=shapes, limit=limit, track=track)

    def params(limit: int) -> Iterator[tuple[str, jax.Array]]:
        return change.merging(stored_as(limit), assembly.shapes) if change else stored_as(limit)

    return Checkpoint(folder, kind, assembly, params)


def tuned(config: TransformerConfig, *, platform: str, quantize: str = "") -> TransformerConfig:
    """The configuration in the form that suits a platform ("cpu", "gpu", "tpu") and `model.quantize`."""
    stacked = platform == "tpu" and config.stackable
    return dataclasses.replace(config, stacked=stacked, quantize=quantize or config.quantize)


def check_quantize(name: str) -> None:
    """Refuses a format of quantization that is not built.

    Raises:
        UsageError: naming those that are.
    """
    if name not in FORMATS:
        raise UsageError(f"model.quantize: expected one of {', '.join(map(repr, FORMATS))}, got {name!r}")


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
