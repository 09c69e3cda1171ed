"""Batches that do not run to their slowest row: as rows are done, new prompts take their slots (`decode.refill`).

A batch is a pytree on the devices. The program lays new rows into it and runs it until enough rows are done; the host
takes those out, has new ones ready and goes on with the same program. A row's numbers are its own: what it decodes to
does not depend on when it came and what stood beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding.driver import Batch, run
from dllm_jax.decoding.engine import Carry, Engine
from dllm_jax.decoding.policies.base import InPlace
from dllm_jax.decoding.state import DecodeState
from dllm_jax.decoding.stepping import full_step, per_row
from dllm_jax.mesh import ACTIVATIONS, constrain, spec
from dllm_jax.models.cache import of_rows, widened

CACHE_AXES = ("batch", None, "kv_heads", None)  # of keys and values; the last of their axes


@functools.partial(jax.jit, donate_argnames="batch")
def refill(engine: Engine, batch: Batch, state: DecodeState, new_B: Bool[Array, "B"], fewest: Int[Array, ""]) -> Batch:
    """Lays new rows into a batch and runs it on.

    Args:
        engine: the decode's parts.
        batch: from the last call, or `blank`; donated.
        state: of the new rows before their first forward, and of the others whatever.
        new_B: which are new.
        fewest: the batch comes back when no more rows than these are live.

    Returns:
        The batch; its counts of iterations and columns are of this call.
    """

    def lay(new: Any, old: Any) -> Any:
        if isinstance(new, InPlace):
            return InPlace(of_rows(new_B, new.value, old.value))
        return jnp.where(per_row(new_B, new), new, old) if new.ndim else new

    carry = jax.tree.map(lay, engine.start(state), batch.carry, is_leaf=_is_in_place)
    after = run(engine, Batch(carry, batch.cache), fewest=fewest)
    return _mapped(lambda x, axes: constrain(x, *axes), after)


def blank(engine: Engine, state: DecodeState, mesh: Mesh) -> Batch:
    """A batch without rows, as shapes on a mesh.

    Args:
        engine: the decode's parts.
        state: shapes of a batch before its first forward.
        mesh: of the batch.
    """

    def opened(engine: Engine, state: DecodeState) -> Batch:
        carry = engine.start(state)
        if not (engine.cache.lasts and engine.cache.widths(engine.geometry)):
            return Batch(carry, None)
        carry, cache = full_step(engine, carry, length=engine.cache.full_columns(engine.geometry))
        return Batch(carry, widened(cache, columns=engine.geometry.columns))

    def shape(x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, spec(axes, x.shape, mesh.shape, rules=ACTIVATIONS))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return _mapped(shape, jax.eval_shape(opened, engine, state))


def zeros(shapes: Batch) -> Batch:
    """The batch on the devices."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def _mapped(change: Any, batch: Batch) -> Batch:
    """The batch with every array changed; `change` gets it with the names of its axes."""

    def of_rows(x: Any) -> Any:
        if isinstance(x, InPlace):
            return InPlace(jax.tree.map(of_cache, x.value))
        return change(x, ("batch", *(None,) * (x.ndim - 1)) if x.ndim else ())

    def of_cache(x: Any) -> Any:
        return change(x, (*(None,) * (x.ndim - len(CACHE_AXES)), *CACHE_AXES))

    carry: Carry = jax.tree.map(of_rows, batch.carry, is_leaf=_is_in_place)
    return Batch(carry, jax.tree.map(of_cache, batch.cache))


def _is_in_place(x: Any) -> bool:
    return isinstance(x, InPlace)
