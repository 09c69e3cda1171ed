"""The scripts of launch/, called from the root of the clone."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
AWKWARD = ["python", "-m", "decode.run", '--config.input.prompt=Sort: oak, it\'s "fern" & $HOME.', "", "a\\b *"]
TPU = ("--name=apd", "--zone=us-west4-a")


def call(
    script: str, *arguments: str, env: Mapping[str, str] = os.environ, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a script of launch/ from the root of the clone."""
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=timeout)
