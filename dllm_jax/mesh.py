"""The device mesh and the rules that place every parameter, every batch and every activation on it.

Axes of the mesh: `data` and `fsdp` split the batch, `tensor` splits heads, the MLP and the vocabulary. `fsdp` also
splits what is stored: in training every weight and its optimizer state, in decoding the weights of the layers where a
device could not hold them otherwise. Wherever a layer uses a split weight it is gathered first, one layer at a time.

Parameters carry logical axis names (`models/layers.py`), and so do activations where they are constrained; the rules
here map both to the mesh. `jax.jit` over arrays placed with `NamedSharding` is what used to be called pjit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dllm_jax import hosts
from dllm_jax.errors import UsageError
from dllm_jax.memory import device_bytes

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
WEIGHTS_SHARE = 0.7  # of a device's memory that weights may take; the rest is for keys, values and temporaries
Rules = Mapping[str, str | tuple[str, ...]]  # logical axis -> axes of the mesh; any other logical axis is replicated
ACTIVATIONS: Rules = {"batch": BATCH_AXES, "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
# Parameters, also where a layer uses them.
DECODING: Rules = {"kv_heads": "tensor", "mlp": "tensor", "experts": "tensor", "vocab": "tensor"}
DECODING_SPLIT: Rules = {**DECODING, "embed": "fsdp"}
TRAINING: Rules = {**DECODING_SPLIT, "vocab_embed": "fsdp"}


def make_mesh(
    *, data: int = 0, fsdp: int = 0, tensor: int = 0, batch_size: int = 0, devices: Sequence[jax.Device] = ()
) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices; `placement.decode_mesh` looks at their memory too.

    With several processes it takes as many devices of each.

    Args:
        data: size of the axis; 0 takes all devices the other axes leave, at most as many as divide the batch evenly.
        fsdp: size of the axis; 0 means 1.
        tensor: size of the axis; 0 means 1.
        batch_size: rows of a batch, for the automatic `data`; 0 if unknown.
        devices: to choose from; default: those of all processes.

    Raises:
        UsageError: the mesh needs more devices than there are, or other numbers of them than every process has.
    """
    fsdp, tensor = fsdp or 1, tensor or 1
    devices = devices or jax.devices()
    available = len(devices)
    if not data:
        rest = max(available // (fsdp * tensor), 1)
        rows = batch_size // fsdp if batch_size % fsdp == 0 else 0
        data = max(d for d in range(1, rest + 1) if rows % d == 0) if rows else 1
    needed = data * fsdp * tensor
    if needed > available:
        raise UsageError(
            f"mesh.data * mesh.fsdp * mesh.tensor: expected at most {available} (the devices here), "
            f"got {data} * {fsdp} * {tensor} = {needed}"
        )
    shape, auto = (data, fsdp, tensor), (AxisType.Auto,) * 3
    chosen = even_share(devices, needed) if hosts.several() else devices[:needed]
    if hosts.several() and tensor <= jax.local_device_count() and (needed // jax.process_count()) % tensor == 0:
        return Mesh(np.array(chosen).reshape(shape), MESH_AXES, axis_types=auto)  # `tensor` stays in a process
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=chosen)
    except (AssertionError, NotImplementedError):  # JAX knows no good order of so many TPUs, or for these axes
        return Mesh(np.array(chosen).reshape(shape), MESH_AXES, axis_types=auto)


def own_device(mesh: Mesh) -> Mesh:
    """A mesh of one device of another mesh, the first that belongs to this process."""
    return Mesh(mesh.local_mesh.devices.flatten()[:1].reshape(1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def even_share(devices: Sequence[jax.Device], needed: int) -> list[jax.Device]:
    """As many devices of every process, process by process: of a mesh in this order the last axes stay in a process.

    Raises:
        UsageError: that does not work out.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    each, over = divmod(needed, len(by_process))
    least = min(map(len, by_process.values()))
    if over or each > least:
        raise UsageError(
            f"mesh: expected devices of all {len(by_process)} processes in equal numbers, at most {least} of each, "
            f"got {needed} in all (mesh.data * mesh.fsdp * mesh.tensor; decode.batch_size bounds an automatic data)"
        )
    return [device for process in sorted(by_process) for device in by_process[process][:each]]


def spec(
    axes: Sequence[str | None], shape: tuple[int, ...], sizes: Mapping[str, int], *, rules: Rules
) -> PartitionSpec:
    """Where an array lives: every logical axis by the rules, replicated if the axes of the mesh do not divide it.

    Args:
        axes: the logical name of every axis of the array, None for those without.
        shape: of the array.
        sizes: of the mesh's axes.
        rules: one of those above.
    """
    names: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = rules.get(axis or "", ())
        parts = math.prod(sizes[name] for name in ((wanted,) if isinstance(wanted, str) else wanted))
        names.append(wanted if wanted and size % parts == 0 else None)
    return PartitionSpec(*names)


def constrain(x: jax.Array, *axes: str | None, rules: Rules = ACTIVATIONS) -> jax.Array:
    """Keeps an array inside a program where the rules say; outside `jax.set_mesh` it goes where the compiler likes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape, rules=rules))


def decoding_rules(abstract_state: Any, mesh: Mesh) -> Rules:
    """`DECODING`, unless a device cannot hold its part of the weights so."""
    limit = None if isinstance(mesh, AbstractMesh) else device_bytes(list(mesh.devices.flat))
    leaves = jax.tree.leaves(abstract_state)
    weights = sum(x.size * x.dtype.itemsize for x in leaves) / mesh.shape["tensor"]
    return DECODING_SPLIT if limit and weights > WEIGHTS_SHARE * limit else DECODING


def weight_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """`state_shardings` of a model that decodes."""
    return state_shardings(abstract_state, mesh, rules=decoding_rules(abstract_state, mesh))


def state_shardings(abstract_state: Any, mesh: Mesh, *, rules: Rules) -> Any:
    """The sharding of every leaf of an abstract state, in the same tree.

    Args:
        abstract_state: parameters (`nnx.eval_shape`), or a tree that has some inside, like the state of an optimizer:
            whatever keeps a parameter's metadata is placed as the parameter (unless it is empty, where an optimizer
            leaves the parameter to another one), anything else is replicated.
        mesh: the devices.
        rules: for parameters.
    """

    def place(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        if not jax.tree.leaves(variable):
            return variable
        axes = variable.get_metadata()["logical_axes"]
        return variable.replace(NamedSharding(mesh, spec(axes, variable.shape, mesh.shape, rules=rules)))

    return jax.tree.map(place, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a tree: the first axis is the batch, scalars are replicated."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(BATCH_AXES) if x.ndim else PartitionSpec()), tree)


def batch_multiple(mesh: Mesh | AbstractMesh) -> int:
    """Batches are padded to a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
