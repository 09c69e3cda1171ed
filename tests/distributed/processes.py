"""Starts one command in several processes on this machine, each with CPU devices of its own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds that a process may take on a busy machine
LOST = 10  # distributed.lost_seconds


class Done(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell a mistake."""
        return [line for line in self.err.splitlines() if line.startswith("error")]


def run(module: str, *settings: str | Sequence[str], count: int = 1, devices: int = 2) -> list[Done]:
    """Runs `python -m MODULE` in `count` processes to the end.

    Args:
        module: the command.
        settings: SECTION.FIELD=VALUE of all processes, or a sequence of one for each process.
        count: processes.
        devices: of each.
    """
    with started(module, *settings, count=count, devices=devices) as processes:
        return [finished(process) for process in processes]


@contextlib.contextmanager
def started(
    module: str, *settings: str | Sequence[str], count: int = 1, devices: int = 2
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of `run` while they run; what is left of them is killed."""
    port = free_port()
    processes = []
    for process in range(count):
        given = [each if isinstance(each, str) else each[process] for each in settings]
        if count > 1:
            given += [
                f"distributed.coordinator=localhost:{port}",
                f"distributed.num_processes={count}",
                f"distributed.process_id={process}",
                f"distributed.lost_seconds={LOST}",
                "distributed.start_seconds=120",
            ]
        flags = [setting if setting.startswith("--") else f"--config.{setting}" for setting in given]
        command = [sys.executable, "-m", module, *flags]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment(devices), **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(process: subprocess.Popen[str]) -> Done:
    """Waits for a process."""
    out, err = process.communicate(timeout=LIMIT)
    return Done(process.returncode, out, err)


def ended_well(results: list[Done]) -> Done:
    """What process 0 left, if all ended well and only it spoke."""
    assert [done.code for done in results] == [0] * len(results), results
    assert not any(done.out or done.err for done in results[1:]), results
    return results[0]


def environment(devices: int) -> dict[str, str]:
    """That of a process with CPU devices; LLVM optimises little, as in all tests."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port that nobody listens to just now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
