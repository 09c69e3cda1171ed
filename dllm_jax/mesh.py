"""The device mesh and the rules that place every parameter and every batch on it.

Axes of the mesh: `data` splits the batch only; `fsdp` splits the batch and the width of every weight; `tensor` splits
heads, the MLP and the vocabulary. Parameters carry logical axis names (`models/layers.py`); the rules here map them
to the mesh. `jax.jit` over arrays placed with `NamedSharding` is what used to be called pjit.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dllm_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
LOGICAL_RULES = {"vocab": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}  # anything else: replicated


def make_mesh(
    *, data: int = 0, fsdp: int = 0, tensor: int = 0, batch_size: int = 0, devices: Sequence[jax.Device] = ()
) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices; `placement.decode_mesh` looks at their memory too.

    Args:
        data: size of the axis; 0 takes all devices the other axes leave, at most as many as divide the batch evenly.
        fsdp: size of the axis; 0 means 1.
        tensor: size of the axis; 0 means 1.
        batch_size: rows of a batch, for the automatic `data`; 0 if unknown.
        devices: to choose from; default: those here.

    Raises:
        UsageError: the mesh needs more devices than there are.
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
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:needed])
    except AssertionError:  # JAX knows no good order of so many TPUs
        return Mesh(np.array(devices[:needed]).reshape(shape), MESH_AXES, axis_types=auto)


def parameter_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives: every logical axis by the rules, replicated if the mesh axis does not divide it."""
    names = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = LOGICAL_RULES.get(axis or "")
        names.append(mesh_axis if mesh_axis and size % mesh.shape[mesh_axis] == 0 else None)
    return PartitionSpec(*names)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of an abstract state, in the same tree.

    Args:
        abstract_state: parameters (`nnx.eval_shape`), or a tree that has some inside, like the state of an optimizer:
            whatever keeps a parameter's metadata is placed as the parameter, anything else is replicated.
        mesh: the devices.
    """

    def place(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_spec(variable.get_metadata()["logical_axes"], variable.shape, mesh)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a tree: the first axis is the batch, scalars are replicated."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(BATCH_AXES) if x.ndim else PartitionSpec()), tree)


def batch_multiple(mesh: Mesh) -> int:
    """Batches are padded to a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
