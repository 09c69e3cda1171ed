"""Times the loading of a checkpoint and its host memory: python -m dllm_jax.bench.loading --path=DIR [--tensor=8].

Prints the bytes of the weights on the devices here, seconds, and the most host memory that was used beside what the
process held before and, on CPU, beside the weights themselves: they live there. Run every measurement in a process of
its own. Files that were read lately come from the memory of the machine, not from its disk.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

from dllm_jax import cli
from dllm_jax.checkpoints.commands import define_path, execute
from dllm_jax.checkpoints.load import DTYPES, load_model
from dllm_jax.errors import UsageError
from dllm_jax.memory import peak_bytes
from dllm_jax.mesh import MESH_AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Loading:
    """What loading a model took."""

    weight_bytes: int  # on the devices of this process, copies counted
    seconds: float
    busy_seconds: float  # of processors, all threads together
    host_bytes: int  # the most in use at once, beside what the process held before and weights on CPU


def measure(path: str, *, dtype: str, mesh: jax.sharding.Mesh, verify: bool) -> Loading:
    """Loads a model; see `load_model`.

    Raises:
        UsageError: it cannot be loaded.
    """
    before = peak_bytes(reset=True)
    start, busy = time.perf_counter(), time.process_time()
    params = jax.tree.leaves(load_model(path, dtype=dtype, mesh=mesh, verify=verify, field="--path").params)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    weights = sum(shard.data.nbytes for param in params for shard in param.addressable_shards)
    held = weights if mesh.devices.flat[0].platform == "cpu" else 0
    return Loading(weights, seconds, busy, max(0, peak_bytes() - before - held))


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    values = flags.FlagValues()
    define_path("path", "folder to load, or the name of a bundled checkpoint", values)
    flags.DEFINE_enum("dtype", "keep", DTYPES, "dtype of the weights", flag_values=values)
    for axis in MESH_AXES:
        flags.DEFINE_integer(axis, 1, f"size of the mesh's axis {axis}", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("verify", True, "compare checksums of a converted folder first", flag_values=values)
    return execute(_measure, argv, values=values, usage=f"{__doc__}\n")


def _measure(values: flags.FlagValues, arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"command line: expected only --flags, got {arguments[0]!r}")
    if not values.path:
        raise UsageError("--path: expected a folder, got none")
    mesh = make_mesh(**{axis: values[axis].value for axis in MESH_AXES})
    done = measure(values.path, dtype=values.dtype, mesh=mesh, verify=values.verify)
    device = mesh.devices.flat[0].device_kind
    print(
        f"{values.path}: {done.weight_bytes / 1e9:.2f} GB of weights on {mesh.local_mesh.devices.size} {device}, "
        f"{done.seconds:.1f} s ({done.busy_seconds:.1f} s of processors), "
        f"{done.host_bytes / 1e9:.2f} GB of host memory beside them"
    )


if __name__ == "__main__":
    cli.leave(main(sys.argv))
