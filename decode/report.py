"""Writes a report on a sweep: python -m decode.report FOLDER.

Options: --baseline=VARIANT, --show=VARIANT,VARIANT, --svg (every picture in a file of its own as well). FOLDER is
the output.path of decode.sweep. FOLDER/report.html is one file with all pictures, FOLDER/report.md has its tables:
accuracy against tokens per forward, the Pareto line, paired comparisons with a baseline, accuracy under parallelism,
what forwards commit, where and how surely. The pictures need the extra `report`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dllm_jax import cli
from dllm_jax.checkpoints.commands import execute
from dllm_jax.data.outputs import replace_file
from dllm_jax.errors import UsageError
from dllm_jax.evals.results import read_folder


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "baseline", "", "what to compare with (default: the variant of most forwards)", flag_values=values
    )
    flags.DEFINE_list("show", [], "variants to look into (default: baseline, Pareto line, others)", flag_values=values)
    flags.DEFINE_boolean("svg", False, "every picture in a file of its own as well", flag_values=values)
    return execute(_report, argv, values=values, usage=f"{__doc__}\n")


def _report(values: flags.FlagValues, arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UsageError(f"command line: expected one folder of a sweep, got {' '.join(arguments) or 'none'}")
    folder = Path(arguments[0])
    variants, unfinished = read_folder(folder)
    from dllm_jax.evals import report  # imports SciPy

    made = report.Report(variants, baseline=values.baseline, shown=values.show)
    title = f"Decoding, compared: {folder.resolve().name}"
    try:
        drawn = report.pictures(made)
    except ModuleNotFoundError as error:
        raise UsageError(f"report: expected Matplotlib (pip install 'dllm_jax[report]'), got {error}") from error
    replace_file(folder / "report.html", report.as_html(made, drawn, title=title, unfinished=unfinished))
    for name, picture in drawn.items() if values.svg else ():
        replace_file(folder / f"report_{name}.svg", picture)
    replace_file(folder / "report.md", report.as_markdown(made, title=title, unfinished=unfinished))
    print(f"{len(variants)} variants: {folder / 'report.html'}, {folder / 'report.md'}")


if __name__ == "__main__":
    cli.leave(main(sys.argv))
