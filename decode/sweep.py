"""Runs decode.eval for every variant that a config file lists, and puts them side by side.

usage: python -m decode.sweep [--config=NAME|FILE] --config.output.path=FOLDER [--config.SECTION.FIELD=VALUE ...]

  python -m decode.sweep --config=ablations/dico --config.output.path=ablations

The file has, besides get_config(variant), the variants' names in VARIANTS; --config=NAME:VARIANT runs one of them.
Results go to FOLDER/VARIANT.jsonl with their metrics, the table, in Markdown, to FOLDER/table.md and the standard
output, and a row for every variant and sample to FOLDER/samples.csv and, with the extra `report`, samples.parquet. All
other settings are those of decode.eval. Models are loaded once. A sweep that was cut off, or ended after SIGTERM, does
not decode finished variants again. `python -m decode.report FOLDER` makes a report of it.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decode import eval as evaluation
from dllm_jax import cli, hosts, remote
from dllm_jax.config import Config
from dllm_jax.data.outputs import replace_file
from dllm_jax.errors import UsageError
from dllm_jax.evals.results import read_variant, tidy
from dllm_jax.evals.samples import write_samples
from dllm_jax.kept import Kept

DEFAULT = "ablations/dico"


def main(argv: Sequence[str]) -> int:
    """Runs all variants and returns the exit code.

    Args:
        argv: the command line, program name first.
    """
    chosen: list[str] = []
    worst = code = cli.guarded(lambda: chosen.extend(variants(cli.split(argv, DEFAULT)[0].config)))
    finished: dict[str, Mapping[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    networks = Kept()
    for experiment in chosen:
        name = experiment.partition(":")[2]
        run = functools.partial(evaluate, name=name, finished=finished, samples=samples, networks=networks)
        code = cli.execute(run, [*argv, f"--config={experiment}"], description=__doc__ or "", default_config=DEFAULT)
        if name not in finished:  # a mistake, or --help
            return code
        worst = max(worst, code)
    return worst


def variants(config: str) -> list[str]:
    """The experiments of a sweep, as FILE:VARIANT.

    Args:
        config: the value of --config; with a variant of its own, only that one.

    Raises:
        UsageError: there is no such file, it lists none, or not this one.
    """
    file, _, only = config.partition(":")
    names = getattr(cli.config_module(file), "VARIANTS", None)
    if not names:
        raise UsageError(f"--config: expected a configuration file with VARIANTS, got {file!r}")
    if only and only not in names:
        raise UsageError(f"--config: expected a variant of {file}, one of {', '.join(names)}, got {only!r}")
    return [f"{file}:{name}" for name in names if not only or name == only]


def evaluate(
    config: Config,
    *,
    name: str,
    finished: dict[str, Mapping[str, Any]],
    samples: list[dict[str, Any]],
    networks: Kept,
) -> int:
    """Runs one variant unless an earlier sweep did, adds what it did to that of the finished ones, and shows all.

    Args:
        config: all settings.
        name: of the variant.
        finished: metrics by variant.
        samples: rows of the table of all samples, in process 0.
        networks: those that are loaded already.

    Returns:
        The exit code of `decode.eval`.
    """
    if config.output.view:
        raise UsageError(
            f"output.view: expected none in a sweep (decode.view takes its outputs), got {config.output.view!r}"
        )
    folder = Path(config.output.path)
    if not config.output.path or remote.is_remote(config.output.path) or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"output.path: expected a folder, got {config.output.path!r}")
    hosts.from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    path = str(folder / f"{name}.jsonl")
    code = evaluation.main(dataclasses.replace(config, output=dataclasses.replace(config.output, path=path)), networks)

    def add() -> Mapping[str, Any]:
        variant = read_variant(Path(path))
        samples.extend(tidy(variant))
        write_samples(folder, samples)
        return variant.metrics

    finished[name] = hosts.from_first(add)
    text = table(finished)
    hosts.from_first(lambda: replace_file(folder / "table.md", text))
    print(text, end="", flush=True)
    return code


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
    cli.leave(main(sys.argv))
