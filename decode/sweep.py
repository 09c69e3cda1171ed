"""Runs decode.eval for every variant that a config file lists, and puts them side by side.

usage: python -m decode.sweep --config=FILE --config.output.path=FOLDER [--config.SECTION.FIELD=VALUE ...]

  python -m decode.sweep --config=configs/ablations/dico.py --config.output.path=ablations

The file has, besides get_config(name), the names in VARIANTS. Results go to FOLDER/NAME.jsonl with their metrics, the
table, in Markdown, to FOLDER/table.md and the standard output. All other settings are those of decode.eval.
"""

import dataclasses
import functools
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decode import eval as evaluation
from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.errors import UsageError

DEFAULT = "configs/ablations/dico.py"


def main(argv: Sequence[str]) -> int:
    """Runs all variants and returns the exit code.

    Args:
        argv: the command line, program name first.
    """
    file = next((flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")), DEFAULT)
    flags = [flag for flag in argv[1:] if not flag.startswith("--config=")]
    names: list[str] = []
    code = cli.guarded(lambda: names.extend(variants(file)))
    finished: dict[str, Any] = {}
    for name in names:
        run = functools.partial(evaluate, name=name, finished=finished)
        named = [argv[0], f"--config={file}:{name}", *flags]
        code = cli.execute(run, named, description=__doc__ or "", default_config=DEFAULT)
        if name not in finished:  # a mistake, or --help
            return code
    return code


def variants(file: str) -> list[str]:
    """The names in a config file.

    Raises:
        UsageError: there is no such file, or it lists none.
    """
    names = runpy.run_path(file).get("VARIANTS") if Path(file).is_file() else None
    if not names:
        raise UsageError(f"--config: expected a configuration file with VARIANTS, got {file!r}")
    return list(names)


def evaluate(config: Config, *, name: str, finished: dict[str, Any]) -> None:
    """Runs one variant, adds its metrics to those of the finished ones, and shows all."""
    folder = Path(config.output.path)
    if not config.output.path or folder.is_file():
        raise UsageError(f"output.path: expected a folder, got {config.output.path!r}")
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / f"{name}.jsonl")
    evaluation.main(dataclasses.replace(config, output=dataclasses.replace(config.output, path=path)))
    finished[name] = json.loads(Path(f"{path}.metrics.json").read_text())
    text = table(finished)
    (folder / "table.md").write_text(text)
    print(text, end="", flush=True)


def table(finished: Mapping[str, Any]) -> str:
    """Accuracy by task and over all samples, tokens per forward, forwards per sample and by phase, as Markdown.

    Args:
        finished: metrics by variant, at least one.
    """
    first = next(iter(finished.values()))
    phases = first.get("forwards_by_phase", {})
    header = ["variant", *first["accuracy_by_task"], "all", "TPF", "NFE", *phases]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, metrics in finished.items():
        accuracies = [*metrics["accuracy_by_task"].values(), metrics["accuracy"]]
        by_phase = [metrics["forwards_by_phase"][phase] / metrics["num_samples"] for phase in phases]
        numbers = [f"{metrics['tokens_per_forward']:.2f}", *(f"{x:.1f}" for x in (metrics["nfe_mean"], *by_phase))]
        lines.append([name, *(f"{accuracy:.2f}" for accuracy in accuracies), *numbers])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
