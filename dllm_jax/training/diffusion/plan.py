"""What a step of a training will take, compiled ahead of time from shapes alone (`decode.plan`)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.bench import plan as planning
from dllm_jax.bench.plan import Rates
from dllm_jax.chips import GPUS
from dllm_jax.data.canvases import Canvases
from dllm_jax.errors import UsageError
from dllm_jax.hlo import Program
from dllm_jax.memory import placed
from dllm_jax.mesh import batch_shardings
from dllm_jax.models.model import Model, computing
from dllm_jax.placement import told
from dllm_jax.training.diffusion.config import DiffusionTraining
from dllm_jax.training.diffusion.train import make_trainer, shape_of
from dllm_jax.training.trainer import Trainer, training_mesh

LENGTH = "canvas_length"


def plan(config: DiffusionTraining) -> dict[str, Any]:
    """Compiles the step of a training for every length of its canvases.

    Args:
        config: what would be trained, and `plan` for what machine; model.preset may stand for model.path.

    Returns:
        As `bench.plan.plan`, with `canvas_length` in the place of `prompt_length`; `loops` has one entry, `step`.

    Raises:
        UsageError: model, topology, mesh or settings do not work out.
    """
    topology = config.plan.topology
    if topology in GPUS:
        raise UsageError(f"plan.topology: expected TPUs, or nothing for the devices here, to train, got {topology}")
    devices = planning.topology_devices(topology) if topology else jax.devices()
    mesh = training_mesh(config.mesh, config.train, devices=devices)
    model = shape_of(config, mesh)
    trainer, rates = make_trainer(config, model), planning.rates_of(devices, model.dtype)
    programs = [_program(config, trainer, model, length, rates) for length in config.data.lengths]
    return planning.outcome(programs, devices, mesh, topology=topology)


def _program(config: DiffusionTraining, trainer: Trainer, model: Model, length: int, rates: Rates) -> dict[str, Any]:
    """The entry of one length."""
    shape = (config.train.batch_size, length)
    dtypes = Canvases(jnp.int32, jnp.bool_, jnp.bool_, jnp.int32, jnp.int32, jnp.int32)
    batch = Canvases(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes))  # type: ignore[arg-type]
    arguments = trainer.abstract, placed(batch, batch_shardings(batch, trainer.mesh)), trainer.frozen
    with computing(trainer.mesh, precision=config.model.matmul_precision):
        entry, program = planning.compiled(trainer.step_on_mesh, arguments)
    loops = {"step": _step(config, model, shape, program, rates)} if program else {}
    return {LENGTH: length, **entry, "loops": loops}


def _step(
    config: DiffusionTraining, model: Model, shape: tuple[int, int], program: Program, rates: Rates
) -> dict[str, Any]:
    """What a step moves, and the least time it takes: matrix products forward and backward, or the links."""
    moved = program.moved("ENTRY")
    seconds = {"matrix products": flops(config, model, *shape) / model.mesh.size / rates.flops}
    if rates.link:
        seconds["links"] = sum(each.sent for each in moved) / rates.link
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "collectives": planning.collectives(moved),
        "floor_ms": seconds[bound] * 1e3,
        "bound_by": bound,
    }


def flops(config: DiffusionTraining, model: Model, rows: int, length: int) -> float:
    """Operations of a step on all devices: two for every weight and token, and the scores, forward and twice backward.

    With `train.remat` once more forward.
    """
    shape = model.config
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params)) - shape.vocab_size * shape.embed_dim
    scores = 2 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return (4 if config.train.remat else 3) * 2 * rows * length * (weights + scores)


def obstacle(results: dict[str, Any]) -> str:
    """Why the plan does not fit and what takes less, in a line."""
    usable = results["usable_per_device"] or 0
    known = {sum(program[part] or 0 for part in planning.PARTS): program[LENGTH] for program in results["programs"]}
    most = max(known)
    return (
        f"does not fit: with canvases of {known[most]} tokens every device needs at least {told(most)} and has "
        f"{told(usable)}; less is needed with more mesh.fsdp or train.microbatches, train.remat=true, or lora.rank"
    )
