"""Whether what is asked for fits into memory: bytes needed and bytes there, before anything is allocated."""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dllm_jax import hosts
from dllm_jax.chips import Chip, chip_of
from dllm_jax.errors import UsageError

# Limits of the process's control group, and what it uses of them: version 2, then 1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
RESET_PEAK = "5"


def peak_bytes(*, reset: bool = False) -> int:
    """The most host memory that this process had in use, since it started or since the last reset (on Linux)."""
    if reset and RESET.exists():
        RESET.write_text(RESET_PEAK)
    if STATUS.exists():
        (peak,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(mesh: Mesh) -> int | None:
    """Bytes that one more allocation may take on every device of a mesh; None if the device does not tell.

    Devices on CPU share the memory of the machine.
    """
    device = mesh.local_mesh.devices.flat[0]
    if device.platform == "cpu":
        return _host_bytes() // mesh.local_mesh.devices.size
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def chip(devices: Sequence[jax.Device]) -> Chip | None:
    """The figures of each of the devices, which are those of its chip or, if some share one, its part of them."""
    first = devices[0]
    found = chip_of(first.device_kind)
    coordinates = [getattr(device, "coords", device.id) for device in devices]
    return found and found.share(coordinates.count(coordinates[0]))


def device_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that programs may use of each of the devices; on CPU of what is free; None if nobody knows.

    Several processes all get what process 0 finds, since the mesh and what it splits depend on it.

    Args:
        devices: all those here, or all of a machine that is only compiled for.
    """
    local = [device for device in devices if device in jax.local_devices()] if hosts.several() else []
    return hosts.agreed("device_bytes", _device_bytes(local)) if local else _device_bytes(devices)


def _device_bytes(devices: Sequence[jax.Device]) -> int | None:
    if devices[0].platform == "cpu":
        return _host_bytes() // len(devices)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised by devices that are only compiled for
        if "bytes_limit" in (stats := devices[0].memory_stats() or {}):
            return stats["bytes_limit"]
    figures = chip(devices)
    return figures and figures.memory - figures.reserved


def placed(shapes: Any, shardings: Any) -> Any:
    """The shapes and dtypes of a tree with a sharding each: what a program is compiled with."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Bytes of a tree on every device.

    Args:
        shapes: arrays or their shapes and dtypes.
        shardings: of each, in the same tree.
    """
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in pairs)


def plan_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes on every device that a program allocates when it runs, its arguments not counted; 0 if it does not tell."""
    plan: Any = compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes if plan else 0


def check_fits(needed: int, mesh: Mesh, *, field: str, got: object) -> None:
    """Refuses what does not fit.

    Args:
        needed: bytes on every device, besides what is allocated already.
        mesh: the devices.
        field: the setting that asks for it, for the error.
        got: its value.

    Raises:
        UsageError: with the bytes needed and there.
    """
    there = available_bytes(mesh)
    if there is not None and needed > there:
        raise UsageError(
            f"{field}: expected what fits into memory, got {got!r}, which needs {needed:,} bytes on every device "
            f"({there:,} are free)"
        )


@contextlib.contextmanager
def exhaustion_told(*, field: str, got: object) -> Iterator[None]:
    """Makes a failed allocation in the block, which `check_fits` could not foresee, a `UsageError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).partition("\n")[0]
        raise UsageError(f"{field}: expected what fits into memory, got {got!r}: {told}") from error


def _host_bytes() -> int:
    """Bytes free on the machine, or left of what the process's group may use."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**63
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # with what caches would give back
                free = int(line.split()[1]) * 2**10
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", without a limit
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(free, 0)
