"""Runs a program of a model in a process of its own; `code_runner.py` is what that process does."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

RUNNER = Path(__file__).with_name("code_runner.py")
FILE_BYTES = 4 * 2**20  # of a file that it writes
STARTING = 30.0  # seconds that Python may take to start on a busy machine, before those of the program begin
PASSED = "passed"


@dataclasses.dataclass(frozen=True)
class CodeLimits:
    """What a program may take."""

    seconds: float = 10.0
    memory_mb: int = 2048


def outcome(program: str, limits: CodeLimits) -> str:
    """Runs a program and tells `PASSED` if it came to its end, else what happened.

    Whatever it says is dropped, its stdin is empty, it has no network, starts no processes, and can write only to a
    folder that is removed afterwards.

    Args:
        program: Python, tests included.
        limits: what it may take.
    """
    with tempfile.TemporaryDirectory(prefix="dllm_jax-", ignore_cleanup_errors=True) as folder:
        order = {
            "program": program,
            "folder": folder,
            "seconds": limits.seconds,
            "memory": limits.memory_mb * 2**20,
            "file_bytes": FILE_BYTES,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(order).encode(), timeout=limits.seconds + STARTING)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode in (-signal.SIGXCPU, -signal.SIGALRM):
        return "timed out"
    try:
        told: str = json.loads(said)["outcome"]
    except (ValueError, KeyError, TypeError):
        return f"ended with code {process.returncode}"
    return told
