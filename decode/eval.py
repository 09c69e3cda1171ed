"""Decodes tasks with known answers and measures accuracy and cost.

usage: python -m decode.eval [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.eval --config=vanilla
  python -m decode.eval --config.input.path=tasks.jsonl --config.output.path=out.jsonl

  python -m decode.eval --config.input.path=gsm8k_test.jsonl --config.output.path=out.jsonl
  python -m decode.eval --config.input.path=HumanEval.jsonl.gz --config.eval.run_code=true

Input lines hold id, task, prompt (or messages, prompt_ids) and answer; without input.path the bundled tasks are
decoded, 20 of each (eval.full=true: 100). dllm_jax/evals/scorers.py lists the tasks that can be scored. Lines of GSM8K,
MATH-500, HumanEval and MBPP are read as they are published: decode.eval words their prompts, with eval.shots solved
examples in front, as messages if the tokenizer has a chat template, and ends their texts at their stop strings. Output
lines are those of decode.run with task and correct; accuracy, in total and by task, is added to the metrics. For GSM8K
correct is the flexible reading (the number that a text comes to) and correct_strict the strict one (the number behind
####). Programs run only with eval.run_code=true, in a process of their own without network, with limits for time,
memory and files.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.data import tasks
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.rows import Row
from dllm_jax.errors import UsageError
from dllm_jax.evals import public, scorers
from dllm_jax.evals.sandbox import CodeLimits
from dllm_jax.viewer import command as view

if TYPE_CHECKING:
    from dllm_jax.kept import Kept


def main(config: Config, networks: "Kept | None" = None) -> int:
    """Decodes and scores all tasks, prints a table, writes results and metrics; 1 if rows ended with an error.

    Args:
        config: all settings.
        networks: those that are loaded already; see `jobs.run`.
    """
    from dllm_jax import jobs, metrics  # import JAX: only after the flags are parsed
    from dllm_jax.evals.metrics import summarize

    is_chat = functools.cache(lambda: _answers_chats(config))

    def check(prompt: Prompt) -> Prompt:
        chat = prompt.doc is not None and is_chat()
        asked = public.asked(prompt, task=config.input.task, chat=chat, shots=config.eval.shots)
        scorers.scorer_for(asked.task, asked.answer)
        scorers.check_allowed(asked.task, run_code=config.eval.run_code)
        return asked

    limits = CodeLimits(config.eval.code_seconds, config.eval.code_memory_mb)
    score = jobs.Score(functools.partial(score_row, limits=limits), summarize)
    config = view.traced(_with_tasks(config))
    outcome = jobs.run(config, command="decode.eval", check=check, score=score, networks=networks)
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
    if config.input.task and config.input.task not in scorers.TASKS:
        raise UsageError(f"input.task: expected one of {', '.join(scorers.TASKS)}, got {config.input.task!r}")
    if config.eval.full and config.input.path:
        raise UsageError(f"eval.full: expected false with input.path, got true with {config.input.path!r}")
    path = config.input.path or str(tasks.HELD_OUT if config.eval.full else tasks.HELD_OUT_SMALL)
    return dataclasses.replace(config, input=dataclasses.replace(config.input, path=path))


def _answers_chats(config: Config) -> bool:
    """Whether prompts become chats: the tokenizer has a template, and it is not switched off."""
    from dllm_jax.checkpoints.load import resolve
    from dllm_jax.data import text

    path = config.tokenizer.path or ("" if config.model.preset else config.model.path)
    if not path or config.tokenizer.chat_template == "off":
        return False
    codec = text.load(
        resolve(path, field="tokenizer.path" if config.tokenizer.path else "model.path"), config.tokenizer
    )
    return codec is not None and codec.tokenizer.chat_template is not None


def score_row(prompt: Prompt, row: Row, *, limits: CodeLimits) -> Row:
    """An output line with task and correct, and correct_strict where a task has a second reading."""
    task, text = prompt.task, row["text"]
    strict = scorers.strict_scorer_for(task, prompt.answer)
    return row | {
        "task": task,
        "correct": scorers.scorer_for(task, prompt.answer, limits=limits)(text),
        **({"correct_strict": strict(text)} if strict else {}),
    }


def _table(metrics: Mapping[str, Any]) -> Table:
    """Accuracy with its interval, forwards and tokens per forward: by task and over all samples."""
    table = Table("Task", box=box.SIMPLE_HEAD)
    for title in ("n", "Accuracy", "95% interval", "NFE", "TPF"):
        table.add_column(title, justify="right")
    names = ("num_samples", "accuracy", "accuracy_interval", "nfe_mean", "tokens_per_forward")
    for task in metrics["accuracy_by_task"]:
        table.add_row(task, *_cells(*(metrics[f"{name}_by_task"][task] for name in names)))
        if task in metrics.get("accuracy_strict_by_task", {}):
            table.add_row(f"{task}, strict", "", f"{metrics['accuracy_strict_by_task'][task]:.3f}")
    table.add_section()
    table.add_row("all samples", *_cells(*(metrics[name] for name in names)))
    table.add_row("mean of tasks", "", f"{metrics['accuracy_macro']:.3f}")
    return table


def _cells(num_samples: int, accuracy: float, interval: Sequence[float], nfe: float, tpf: float) -> tuple[str, ...]:
    low, high = interval
    return str(num_samples), f"{accuracy:.3f}", f"{low:.3f} - {high:.3f}", f"{nfe:.1f}", f"{tpf:.2f}"


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla")
