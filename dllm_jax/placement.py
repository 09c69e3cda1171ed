"""How much memory a decode takes on every device, from shapes alone, and the mesh chosen by it.

Weights are exact. Keys, values and temporaries are estimated with `MARGIN`; `decode.plan` compiles and knows.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.load import dtype_on, resolve, tuned
from dllm_jax.config import Config
from dllm_jax.decoding.build import build_axes, build_geometry, suited
from dllm_jax.decoding.caching import shorter_canvases
from dllm_jax.decoding.canvas import bucketed_prompt_length
from dllm_jax.decoding.generate import length_multiple, with_slack
from dllm_jax.decoding.policies.build import companions_of
from dllm_jax.errors import UsageError
from dllm_jax.memory import bytes_per_device, device_bytes
from dllm_jax.mesh import MESH_AXES, batch_multiple, make_mesh, weight_shardings
from dllm_jax.models.attention import kernel, key_multiple
from dllm_jax.models.model import abstract_model
from dllm_jax.models.presets import PRESETS
from dllm_jax.models.transformer import TransformerConfig, on_mesh
from dllm_jax.settings import POLICY_FITS

MARGIN = 1.1  # on temporaries, keys and values
SPARE = 0.04  # of a device's memory that is left for what no estimate knows: code of other programs, transfers
CODE = 6 * 2**20  # bytes of a TPU program for every kind of step


class Shapes(NamedTuple):
    """The models of a decode, as their config.json files describe them."""

    model: TransformerConfig
    companions: Mapping[str, TransformerConfig]  # of the policy, by name; without those that are small
    dtype: np.dtype
    platform: str

    @classmethod
    def of(cls, config: Config, *, platform: str) -> "Shapes":
        """Those that a configuration names.

        Raises:
            UsageError: there is no such model.
        """
        model, dtype = model_shape(config, platform=platform)
        shapes = {each.name: each.shape(config, platform=platform) for each in companions_of(config)}
        return cls(model, {name: shape for name, shape in shapes.items() if shape}, dtype, platform)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on every device."""

    weights: int
    cache: int  # keys and values
    temporaries: int  # and, on TPUs, code

    @property
    def total(self) -> int:
        """All of it, with the margin."""
        return self.weights + int(MARGIN * (self.cache + self.temporaries))

    def fits(self, memory: int) -> bool:
        """Whether a device with so many bytes for programs can hold it with `SPARE`."""
        return self.total <= (1 - SPARE) * memory

    def __str__(self) -> str:
        return (
            f"{told(self.total)} (weights {told(self.weights)}, keys and values {told(self.cache)}, temporaries "
            f"{told(self.temporaries)}, with a margin of {MARGIN - 1:.0%} on the last two)"
        )


def told(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def model_shape(config: Config, *, platform: str) -> tuple[TransformerConfig, np.dtype]:
    """The model that would be loaded, by its config.json alone, and its dtype.

    Args:
        config: all settings.
        platform: it would run on.

    Raises:
        UsageError: there is no such model.
    """
    settings = config.model
    if settings.preset not in ("", *PRESETS):
        raise UsageError(f"model.preset: expected one of {', '.join(PRESETS)}, got {settings.preset!r}")
    shape = PRESETS[settings.preset] if settings.preset else files.read_config(resolve(settings.path))
    dtype = dtype_on(platform, settings.dtype)
    return tuned(shape, platform=platform, quantize=settings.quantize), dtype


def footprint(config: Config, shapes: Shapes, mesh: Mesh, *, prompt_length: int) -> Footprint:
    """Estimates what decoding takes on every device of a mesh.

    Compared with what the compiler plans in CONTRIBUTING.md (Memory).

    Args:
        config: all settings.
        shapes: the models.
        mesh: the devices.
        prompt_length: tokens of the longest prompt.
    """
    config = suited(config, shapes.model)
    decode, dtype, platform = config.decode, shapes.dtype, shapes.platform
    model, others = on_mesh(shapes.model, mesh), [on_mesh(each, mesh) for each in shapes.companions.values()]
    multiple = length_multiple(platform)
    most = min(each.max_length for each in (model, *others)) - decode.gen_length
    padded = bucketed_prompt_length(
        prompt_length, decode.gen_length, multiple=multiple, waste=decode.bucket_waste, most=most
    )
    geometry = build_geometry(config, model, prompt_length=padded)
    blocks, strategy = build_axes(config, model)
    widths = strategy.widths(geometry)
    columns = with_slack(geometry, strategy, blocks, multiple=key_multiple(platform)).columns
    split = batch_multiple(mesh)
    batch = -(-decode.batch_size // split)
    rows, tensor = batch * (2 if decode.cfg_scale else 1), mesh.shape["tensor"]

    def share(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    def key_values(config: TransformerConfig, rows: int) -> int:
        return 2 * config.num_layers * rows * columns * share(config.stored_kv_heads) * config.head_dim * dtype.itemsize

    heads = model.stored_groups * share(model.stored_kv_heads)
    slots = geometry.gen_length if decode.stop != "none" and not widths else blocks.width(geometry)
    kind = kernel(platform, dtype, rows=rows, queries=geometry.length, keys=geometry.length, head_dim=model.head_dim)
    # Scores and their softmax in float32; the other kernels keep them out of memory.
    is_dense = kind.startswith("xla") or POLICY_FITS[decode.policy].dense
    scores = 2 * rows * heads * geometry.length**2 * 4 if is_dense else 0
    # So many arrays as wide as the model, by what the compiler plans.
    activations = rows * geometry.length * (6 * model.embed_dim + 3 * share(model.mlp_dim)) * dtype.itemsize
    if model.experts:  # rows of tokens and experts as they go in, between, and in float32 as they come out
        wide = max(dtype.itemsize, 4)
        each = 2 * model.embed_dim * (dtype.itemsize + wide) + 3 * model.experts.hidden_dim * dtype.itemsize
        activations += rows * geometry.length * model.experts.per_token * each
    logits = (3 if decode.temperature else 2) * rows * slots * share(model.vocab_size) * 4
    weights = _weights(model, dtype, mesh)
    cache = key_values(model, rows) * min(len(widths), 3)  # the widths of a prefix cache begin with copies of it
    canvases = shorter_canvases(geometry, multiple=multiple) if "eot" in decode.stop and not widths else (geometry,)
    code = CODE * (len(canvases) + len(widths))
    temporaries = scores + activations + logits + (code if platform == "tpu" else 0)
    for other in others:
        weights, cache = weights + _weights(other, dtype, mesh), cache + key_values(other, batch)
        temporaries += 2 * batch * slots * share(other.vocab_size) * 4
    return Footprint(weights, cache, temporaries)


def _weights(config: TransformerConfig, dtype: np.dtype, mesh: Mesh) -> int:
    """Bytes of the weights on every device."""
    abstract = _abstract(config, dtype)
    return bytes_per_device(abstract, weight_shardings(abstract, mesh))


@functools.cache
def _abstract(config: TransformerConfig, dtype: np.dtype) -> nnx.State:
    return abstract_model(config, dtype=dtype)[1]


def decode_mesh(
    config: Config,
    *,
    prompt_length: int,
    batch_multiple: int = 0,
    devices: Sequence[jax.Device] = (),
    must_fit: bool = True,
) -> Mesh:
    """The mesh of a configuration; an automatic `tensor` is the least with which the decode fits into memory.

    What is chosen, and why, goes to stderr where there is a choice. On CPU, where devices share the memory, it is 1.

    Args:
        config: all settings.
        prompt_length: tokens of the longest prompt, about.
        batch_multiple: what an automatic `data` divides (default: decode.batch_size).
        devices: to choose from; default: those here.
        must_fit: whether nothing is chosen where nothing fits; else what comes closest.

    Raises:
        UsageError: nothing fits and must_fit, or the mesh needs more devices than there are.
    """
    devices = devices or jax.devices()
    sizes = dataclasses.asdict(config.mesh) | {
        "batch_size": batch_multiple or config.decode.batch_size,
        "devices": devices,
    }
    memory, platform = device_bytes(devices), devices[0].platform
    if config.mesh.tensor or platform == "cpu" or memory is None:
        return make_mesh(**sizes)
    shapes = Shapes.of(config, platform=platform)
    fixed = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    for tensor in tensor_sizes(len(devices) // fixed):
        mesh = make_mesh(**sizes | {"tensor": tensor})
        needed = footprint(config, shapes, mesh, prompt_length=prompt_length)
        if needed.fits(memory):
            break
    kind = f"{len(devices)} x {devices[0].device_kind}, {told(memory)} each"
    if must_fit and not needed.fits(memory):
        asked = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=tensor))
        raise UsageError(
            f"mesh: expected a decode that fits into {kind}, got one that needs about {needed} with mesh.tensor "
            f"{tensor}; {alternative(asked, shapes, memory, prompt_length=prompt_length)}"
        )
    if len(devices) > 1:
        chosen = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        print(f"mesh: {chosen} (of {kind}): about {needed} per device", file=sys.stderr)
    return mesh


def abstract_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of devices that need not exist, for `footprint`."""
    return cast(Mesh, AbstractMesh((data, fsdp, tensor), MESH_AXES))


def tensor_sizes(most: int) -> list[int]:
    """The sizes to try for the axis `tensor`: powers of two up to `most`, at least 1."""
    return [2**power for power in range(max(most, 1).bit_length())]


def alternative(config: Config, shapes: Shapes, memory: int, *, prompt_length: int) -> str:
    """What would fit, for people: the smallest mesh, smaller weights, the largest batch.

    Args:
        config: what does not fit.
        shapes: its models.
        memory: bytes of every device.
        prompt_length: tokens of the longest prompt.
    """

    def fits(
        *,
        tensor: int,
        dtype: np.dtype = shapes.dtype,
        batch: int = config.decode.batch_size,
        quantize: str = shapes.model.quantize,
    ) -> bool:
        mesh = abstract_mesh(data=1, fsdp=1, tensor=tensor)
        smaller = dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch_size=batch))
        model = dataclasses.replace(shapes.model, quantize=quantize)
        needed = footprint(smaller, shapes._replace(model=model, dtype=dtype), mesh, prompt_length=prompt_length)
        return needed.fits(memory)

    found = []
    tensors, tensor = tensor_sizes(shapes.model.num_kv_heads), config.mesh.tensor or 1
    if size := next((size for size in tensors if fits(tensor=size)), 0):
        found.append(f"mesh.tensor={size} on {size} of these devices")
    half = np.dtype("bfloat16")
    if shapes.dtype.itemsize > 2 and fits(tensor=tensor, dtype=half):
        found.append("model.dtype=bfloat16")
    if not shapes.model.quantize and fits(tensor=tensor, quantize="int8"):
        found.append("model.quantize=int8")
    smaller = (config.decode.batch_size >> power for power in range(1, config.decode.batch_size.bit_length()))
    if size := next((size for size in smaller if fits(tensor=tensor, batch=size)), 0):
        found.append(f"decode.batch_size={size}")
    return f"by estimate {', or '.join(found) or 'no other mesh, weights or batch'} would fit"
