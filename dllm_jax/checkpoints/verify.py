"""Checks a converted checkpoint against its manifest: python -m dllm_jax.checkpoints.verify DIR."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dllm_jax import cli
from dllm_jax.checkpoints.commands import execute
from dllm_jax.checkpoints.manifest import NAME, verify_folder
from dllm_jax.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    return execute(_verify, argv, values=flags.FlagValues(), usage=f"{__doc__}\n")


def _verify(values: flags.FlagValues, arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UsageError(f"command line: expected one folder, got {' '.join(arguments) or 'none'}")
    folder = Path(arguments[0])
    if not folder.is_dir():
        raise UsageError(f"command line: expected a folder, got {arguments[0]!r}")
    print(f"{folder}: all {verify_folder(folder)} files match {NAME}")


if __name__ == "__main__":
    cli.leave(main(sys.argv))
