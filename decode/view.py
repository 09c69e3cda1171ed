"""Shows how prompts were decoded, forward by forward: a page, a picture, or in the terminal.

usage: python -m decode.view OUT.jsonl [OTHER.jsonl ...] --output=FILE.html [--format=html|gif|terminal]

  python -m decode.run --config=threshold --config.output.trace=true --config.output.path=threshold.jsonl
  python -m decode.run --config=apd --config.output.trace=true --config.output.path=apd.jsonl
  python -m decode.view threshold.jsonl apd.jsonl --output=race.html
  python -m decode.view threshold.jsonl apd.jsonl --format=gif --output=race.gif --ids=sort-002
  python -m decode.view threshold.jsonl --format=terminal

Up to four outputs of the same prompts stand side by side. The page is one file that needs no server and no network; a
picture and the terminal show one prompt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from dllm_jax import cli
from dllm_jax.checkpoints.commands import define_path, execute
from dllm_jax.data.outputs import check_writable, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.viewer import terminal
from dllm_jax.viewer.choice import Race, races
from dllm_jax.viewer.page import page

FORMATS = ("html", "gif", "terminal")
STILL_LINES = 1000  # of a canvas that is printed, not played


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    values = flags.FlagValues()
    define_path("output", "the file to write: expected for html and gif", values)
    flags.DEFINE_enum("format", "html", FORMATS, "what to make: html, gif or terminal", flag_values=values)
    flags.DEFINE_list(
        "labels", [], "names of the decoders, one per output (default: what they are)", flag_values=values
    )
    flags.DEFINE_list("ids", [], "prompts to show, by their ids (default: the first)", flag_values=values)
    flags.DEFINE_integer("most", 20, "prompts in a page, at most", lower_bound=1, flag_values=values)
    flags.DEFINE_float("speed", 8.0, "forwards per second in gif and terminal", lower_bound=0.1, flag_values=values)
    flags.DEFINE_integer("columns", 40, "letters in a line of a gif", lower_bound=10, flag_values=values)
    flags.DEFINE_string("title", "", "a line above a gif", flag_values=values)
    flags.DEFINE_integer("step", -1, "in the terminal, a still picture of this step", flag_values=values)
    return execute(_view, argv, values=values, usage=f"{__doc__}\n")


def _view(values: flags.FlagValues, arguments: list[str]) -> None:
    if values.format == "terminal":
        if values.output:
            raise UsageError(f"--output: expected none with --format=terminal, got {values.output!r}")
    else:
        if values.format == "gif":
            cli.require("PIL", "matplotlib", extra="viz")
        path = check_writable(values.output, ("",), field="--output")[0]
        if path in [Path(argument).resolve() for argument in arguments]:
            raise UsageError(f"--output: expected a place apart from the outputs, got {values.output!r}")
    most = values.most if values.format == "html" else 1
    shown, left_out = races(list(map(Path, arguments)), labels=values.labels, ids=values.ids, most=most)
    if values.format == "terminal":
        _show(shown[0], speed=values.speed, step=values.step)
        return
    if values.format == "html":
        content: str | bytes = page(shown, left_out=left_out)
    else:
        from dllm_jax.viewer.picture import gif  # needs packages of an extra

        content = gif(shown[0], title=values.title, columns=values.columns, speed=values.speed)
    replace_file(path, content)
    print(f"{len(shown)} prompts in {values.output}" if len(shown) > 1 else f"prompt {shown[0].id} in {values.output}")


def _show(race: Race, *, speed: float, step: int) -> None:
    """The race in this terminal; where there is none, or for one step, a still picture."""
    console = Console(highlight=False)
    if step < 0 and console.is_terminal:
        terminal.play(race, console, speed=speed)
        return
    at = race.forwards if step < 0 else min(step, race.forwards)
    console.print(terminal.picture(race, at, width=console.width, height=STILL_LINES))


if __name__ == "__main__":
    cli.leave(main(sys.argv))
