"""A model ready to run: its configuration, structure and weights placed on a mesh."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dllm_jax.memory import placed
from dllm_jax.mesh import weight_shardings
from dllm_jax.models.transformer import Transformer, TransformerConfig, on_mesh


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and what is needed to run them.

    `graphdef` and `params` go into a jitted function as arguments and are merged inside it (`nnx.merge`): a module
    captured by a closure would put its weights into the program as constants.
    """

    config: TransformerConfig
    graphdef: Any
    params: nnx.State
    mesh: Mesh
    path: str = ""  # the checkpoint folder, "" for random weights

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and of all weights that are not quantized."""
        embedding: Any = self.params["embedding"]
        return embedding.get_value().dtype


@contextlib.contextmanager
def computing(mesh: Mesh, *, precision: str = "default") -> Iterator[None]:
    """Inside it programs keep their activations on a mesh by its rules, and have the precision asked for.

    Args:
        mesh: of the model.
        precision: of matrix products, as `model.matmul_precision` names it; "default" changes nothing.
    """
    with (
        jax.set_mesh(mesh),
        contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision),
    ):
        yield


def abstract_model(config: TransformerConfig, *, dtype: jnp.dtype) -> tuple[Any, nnx.State]:
    """Structure and abstract parameters (`jax.ShapeDtypeStruct`) of a model; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=None)))


def with_causal_block(model: Model, block: int) -> Model:
    """The model with another mask over the same weights, which no mask changes.

    Args:
        model: loaded, random, or of shapes.
        block: the blocks that its mask is causal by; 1: causal, 0: every position sees all others.
    """
    if block == model.config.causal_block:
        return model
    config = dataclasses.replace(model.config, causal_block=block)
    graphdef, _ = abstract_model(config, dtype=model.dtype)
    return dataclasses.replace(model, config=config, graphdef=graphdef)


def shape_model(config: TransformerConfig, *, dtype: jnp.dtype, mesh: Mesh) -> Model:
    """A model whose weights are only shapes on the mesh: programs compile with it, nothing is allocated."""
    config = on_mesh(config, mesh)
    graphdef, abstract = abstract_model(config, dtype=dtype)
    return Model(config, graphdef, placed(abstract, weight_shardings(abstract, mesh)), mesh)


def random_model(config: TransformerConfig, *, dtype: jnp.dtype, mesh: Mesh, seed: int) -> Model:
    """A model with random weights, made in place on the mesh (for benchmarks and tests)."""
    config = on_mesh(config, mesh)
    graphdef, abstract = abstract_model(config, dtype=dtype)

    def init() -> nnx.State:
        return nnx.state(Transformer(config, dtype=dtype, rngs=nnx.Rngs(seed)))

    params = jax.jit(init, out_shardings=weight_shardings(abstract, mesh))()
    return Model(config=config, graphdef=graphdef, params=params, mesh=mesh)
