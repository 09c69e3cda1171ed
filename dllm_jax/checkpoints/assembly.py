"""From parameters as they are stored, one at a time, to those of a model on its mesh.

A stored parameter belongs to one layer and knows no mesh. A model may have copies of its key/value heads
(`transformer.on_mesh`), matrices in 8 bits, and all layers in one array. Every parameter is brought into this form when
it is read, on the devices where it stays, so little more memory is used than the model takes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dllm_jax.checkpoints import layout
from dllm_jax.memory import bytes_per_device, placed
from dllm_jax.mesh import weight_shardings
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.quantize import quantized
from dllm_jax.models.transformer import TransformerConfig


class Assembly:
    """The parameters of a model that is being read.

    Args:
        stored: the configuration of the checkpoint; of how its parameters are stored `quantize` counts.
        config: that of the model, which differs in how they are stored.
        dtype: of the model.
        mesh: where it goes.

    Attributes:
        shapes: what to read, by path: shapes, dtypes and shardings of the stored parameters.
        wanted: the same of the model's parameters.
    """

    def __init__(self, stored: TransformerConfig, config: TransformerConfig, *, dtype: np.dtype, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        plain = dataclasses.replace(config, kv_copies=1, stacked=False, quantize=stored.quantize)
        self.shapes = _shapes(plain, dtype=dtype, mesh=mesh)
        self._changes = plain != config
        self._quantizes = config.quantize != stored.quantize
        self._graphdef, self._abstract = abstract_model(config, dtype=dtype)
        self.wanted = _shapes(config, dtype=dtype, mesh=mesh)
        self._params: dict[str, jax.Array] = {}
        self._programs: dict[str, Callable[[jax.Array], dict[str, jax.Array]]] = {}

    @property
    def bytes_per_device(self) -> int:
        """What the model takes on every device."""
        return bytes_per_device(self.wanted, {path: shape.sharding for path, shape in self.wanted.items()})

    def add(self, path: str, array: jax.Array) -> None:
        """Takes a parameter of the checkpoint, which is not needed any longer.

        Args:
            path: its name, one of `shapes`.
            array: as `shapes` wants it.
        """
        layer = self._target(path)[1]
        for target, part in self.formed(path, array).items():
            if layer is None:
                self._params[target] = part
                continue
            if target not in self._params:
                wanted = self.wanted[target]
                self._params[target] = jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
            self._params[target] = _insert(self._params[target], part, layer)

    def formed(self, path: str, array: jax.Array) -> dict[str, jax.Array]:
        """A parameter of the checkpoint in the model's form.

        Args:
            path: its name, one of `shapes`.
            array: as `shapes` wants it.

        Returns:
            By name the model's parameters that are made of it; of a stacked one the layer.
        """
        if not self._changes:
            return {path: array}
        target, layer = self._target(path)
        name = target if layer is not None else _in_every_layer(path)
        if name not in self._programs:
            self._programs[name] = self._program(name, target, of_stack=layer is not None)
        return {target + suffix: part for suffix, part in self._programs[name](array).items()}

    def _target(self, path: str) -> tuple[str, int | None]:
        """Where a parameter of the checkpoint goes: the name of the model's, and its layer there if that is stacked."""
        return layout.stack_place(path, apart=self.config.apart) if self.config.stacked else (path, None)

    def model(self, path: str) -> Model:
        """The model, when all of its parameters are there.

        Args:
            path: the folder that they came from.
        """
        params = layout.unflatten(self._abstract, self._params)
        return Model(self.config, self._graphdef, params, self.mesh, path)

    def _program(self, name: str, target: str, *, of_stack: bool) -> Callable[[jax.Array], dict[str, jax.Array]]:
        """What brings a parameter into its form: new arrays by what is added to the parameter's name."""
        kind = name.rpartition(".")[2]
        splits = self._quantizes and kind in layout.INPUTS
        suffixes = ("", "_scale") if splits else ("",)

        def place(suffix: str) -> NamedSharding:
            wanted: Any = self.wanted[target + suffix].sharding
            return NamedSharding(wanted.mesh, PartitionSpec(*wanted.spec[1:])) if of_stack else wanted

        def form(array: jax.Array) -> dict[str, jax.Array]:
            config = self.config
            array = layout.spread(kind, array, groups=config.stored_groups, copies=config.kv_copies)
            parts = quantized(array, axes=layout.INPUTS[kind]) if splits else (array,)
            values, *scale = parts
            values = layout.stacked(kind, values) if of_stack else values
            return dict(zip(suffixes, (values, *scale), strict=True))

        return jax.jit(form, out_shardings={suffix: place(suffix) for suffix in suffixes})


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, part: jax.Array, layer: int | jax.Array) -> jax.Array:
    """Writes one layer of a stacked parameter in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def _in_every_layer(path: str) -> str:
    """The name of a parameter without the number of its layer, if it has one: layers.attention.qkv."""
    return re.sub(r"^layers\.\d+\.", "layers.", path)


def _shapes(config: TransformerConfig, *, dtype: np.dtype, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model on a mesh, by path."""
    abstract = abstract_model(config, dtype=dtype)[1]
    return layout.flatten(placed(abstract, weight_shardings(abstract, mesh)))
