"""The console command `dllm-jax`: every command of the package under one name, from any directory.

`dllm-jax NAME ...` is `python -m MODULE ...` of a clone.
"""

import difflib
import runpy
import sys
from typing import NamedTuple

from dllm_jax import cli
from dllm_jax.errors import UsageError
from dllm_jax.version import __version__


class Command(NamedTuple):
    """A module that is run as `__main__`, and its line of --help."""

    module: str
    meaning: str


COMMANDS = {
    "run": Command("decode.run", "decode prompts with a diffusion language model"),
    "eval": Command("decode.eval", "decode tasks with known answers: accuracy and cost"),
    "sweep": Command("decode.sweep", "eval for every variant of an experiment, side by side"),
    "report": Command("decode.report", "one page on a sweep: pictures, tables, paired comparisons"),
    "lm-eval": Command("decode.lm_eval", "run tasks of lm-evaluation-harness"),
    "view": Command("decode.view", "how prompts were decoded, forward by forward: page, picture, terminal"),
    "chat": Command("decode.chat", "talk to a model in the terminal, and see its canvas fill"),
    "bench": Command("decode.bench", "measure steps and decodes against what the device allows"),
    "plan": Command("decode.plan", "what a decode or a training will take, before anything is loaded"),
    "convert": Command("dllm_jax.checkpoints.convert", "convert a checkpoint between Hugging Face and Orbax"),
    "verify": Command("dllm_jax.checkpoints.verify", "check a converted checkpoint against its manifest"),
    "train-diffusion": Command("train.diffusion", "train a diffusion model, whole or as an adapter (LoRA)"),
    "train-filter": Command("train.filter", "train a filter for the policy learn2pd"),
    "train-verifier": Command("train.verifier", "train a verifier for the policy apd"),
}


def main() -> int:
    """Runs the command that the arguments of this process name, and returns the exit code."""
    return cli.guarded(_run)


def _run() -> None:
    name, *rest = sys.argv[1:] or [""]
    if name in ("--help", "-h"):
        print(f"usage: {cli.PROGRAM} COMMAND [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]\n")
        print(*(f"  {command:15} {about.meaning}" for command, about in COMMANDS.items()), sep="\n")
        print(f"\n{cli.PROGRAM} COMMAND --help lists its settings; {cli.PROGRAM} --version tells the version")
    elif name == "--version":
        print(cli.PROGRAM, __version__)
    elif name in COMMANDS:
        sys.argv[:] = [f"{cli.PROGRAM} {name}", *rest]
        sys.path.insert(0, str(cli.ROOT))
        runpy.run_module(COMMANDS[name].module, run_name="__main__")
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"close to {close[0]}" if close else f"one of {', '.join(COMMANDS)}"
        got = repr(name) if name else "none"
        raise UsageError(f"command line: expected a command, got {got} ({hint}; see {cli.PROGRAM} --help)")


if __name__ == "__main__":
    sys.exit(main())
