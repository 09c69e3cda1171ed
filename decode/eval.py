"""Decodes tasks with known answers and measures accuracy and cost.

usage: python -m decode.eval [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.eval --config=vanilla
  python -m decode.eval --config.input.path=tasks.jsonl --config.output.path=out.jsonl

Input lines hold id, task, prompt (or messages, prompt_ids) and answer; without input.path the bundled tasks are
decoded, 20 of each. dllm_jax/evals/scorers.py lists the tasks that can be scored. Output lines are those of decode.run
with task and correct; accuracy, in total and by task, is added to the metrics.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.data import tasks
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.rows import Row
from dllm_jax.errors import UsageError
from dllm_jax.evals.scorers import scorer_for
from dllm_jax.viewer import command as view


def main(config: Config) -> int:
    """Decodes and scores all tasks, prints a table, writes results and metrics; 1 if rows ended with an error."""
    from dllm_jax import jobs, metrics  # import JAX: only after the flags are parsed
    from dllm_jax.evals.metrics import summarize

    def check(prompt: Prompt) -> None:
        scorer_for(prompt.task, prompt.answer)

    score = jobs.Score(_scored, summarize)
    config = view.traced(_with_tasks(config))
    outcome = jobs.run(config, command="decode.eval", check=check, score=score)
    view.write(config, outcome.rows)
    Console(highlight=False).print(_table(outcome.metrics))
    print(metrics.summary(outcome.metrics))
    if config.output.path:
        print(metrics.places(config))
    return jobs.exit_code(outcome)


def _with_tasks(config: Config) -> Config:
    """The configuration with the bundled tasks as its input, if it names none."""
    if config.input.prompt:
        raise UsageError(f"input.prompt: expected a file of tasks in input.path instead, got {config.input.prompt!r}")
    path = config.input.path or str(tasks.HELD_OUT_SMALL)
    return dataclasses.replace(config, input=dataclasses.replace(config.input, path=path))


def _scored(prompt: Prompt, row: Row) -> Row:
    """The output line with task and correct."""
    return row | {"task": prompt.task, "correct": scorer_for(prompt.task, prompt.answer)(row["text"])}


def _table(metrics: Mapping[str, Any]) -> Table:
    """Accuracy with its interval, forwards and tokens per forward: by task and over all samples."""
    table = Table("Task", box=box.SIMPLE_HEAD)
    for title in ("n", "Accuracy", "95% interval", "NFE", "TPF"):
        table.add_column(title, justify="right")
    names = ("num_samples", "accuracy", "accuracy_interval", "nfe_mean", "tokens_per_forward")
    for task in metrics["accuracy_by_task"]:
        table.add_row(task, *_cells(*(metrics[f"{name}_by_task"][task] for name in names)))
    table.add_section()
    table.add_row("all samples", *_cells(*(metrics[name] for name in names)))
    table.add_row("mean of tasks", "", f"{metrics['accuracy_macro']:.3f}")
    return table


def _cells(num_samples: int, accuracy: float, interval: Sequence[float], nfe: float, tpf: float) -> tuple[str, ...]:
    low, high = interval
    return str(num_samples), f"{accuracy:.3f}", f"{low:.3f} - {high:.3f}", f"{nfe:.1f}", f"{tpf:.2f}"


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla")
