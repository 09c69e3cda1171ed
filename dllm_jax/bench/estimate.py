"""What a decode takes on a GPU that is not here: by estimate, since programs for it compile only where there is one."""

from typing import Any

from dllm_jax.chips import GPUS
from dllm_jax.config import Config
from dllm_jax.errors import UsageError
from dllm_jax.placement import Shapes, abstract_mesh, footprint
from dllm_jax.settings import numbers


def estimate(config: Config) -> dict[str, Any]:
    """The results of `plan.plan` for one GPU of those in `chips.GPUS`, from shapes alone.

    Weights are exact, the rest is `placement.footprint` with its margin; no seconds, no loops.

    Args:
        config: with the name of a GPU as `plan.topology`.

    Raises:
        UsageError: the mesh needs more than one device, or model and settings do not work out.
    """
    chip = GPUS[config.plan.topology]
    mesh = abstract_mesh(**{axis: size or 1 for axis, size in vars(config.mesh).items()})
    if mesh.size > 1:
        raise UsageError(f"mesh: expected one device with plan.topology {chip.name}, got {mesh.size}")
    shapes = Shapes.of(config, platform="gpu")
    usable, fits = chip.memory - chip.reserved, True
    programs: list[dict[str, Any]] = []
    for length in numbers("plan.prompt_length", config.plan.prompt_length):
        needed = footprint(config, shapes, mesh, prompt_length=length)
        fits &= needed.fits(usable)
        rest = needed.total - needed.weights
        sizes = {"argument_bytes": needed.weights, "temp_bytes": rest, "output_bytes": 0, "code_bytes": 0}
        programs.append({"prompt_length": length, "compile_seconds": None, **sizes, "loops": {}})
    return {
        "topology": config.plan.topology,
        "chip": chip.name,
        "devices": 1,
        "mesh": dict(mesh.shape),
        "fits": fits,
        "memory_per_device": chip.memory,
        "usable_per_device": usable,
        "platform": "gpu",
        "estimated": True,
        "programs": programs,
    }
