r"""Decodes prompts with a diffusion language model.

usage: python -m decode.run [--config=NAME|FILE] [--config.SECTION.FIELD=VALUE ...]

  python -m decode.run --config=vanilla
  python -m decode.run --config.input.prompt="Sort the list: oak, fern, duck."
  python -m decode.run --config.model.path=LLaDA-8B-Instruct \
      --config.input.path=in.jsonl --config.output.path=out.jsonl

Results go to output.path, one JSON object per line in input order, and metrics to the same name + .metrics.json. A run
that was cut off, or ended after SIGTERM, continues where it stopped when started again. Without output.path results are
printed: a table on a terminal, else the JSON lines on stdout and a summary on stderr.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.data import traces
from dllm_jax.viewer import command as view

if TYPE_CHECKING:
    from dllm_jax.data.prompts import Prompt
    from dllm_jax.data.rows import Row


def main(config: Config) -> int:
    """Decodes all prompts and writes or prints the results; returns 1 if rows ended with an error."""
    from dllm_jax import jobs, metrics  # import JAX: only after the flags are parsed

    traced = view.traced(config)
    outcome = jobs.run(traced, command="decode.run")
    view.write(traced, outcome.rows)
    summary = metrics.summary(outcome.metrics)
    if config.output.path:
        print(f"{summary}\n{metrics.places(config)}")
    elif sys.stdout.isatty():
        Console(highlight=False).print(_table(outcome.prompts, outcome.rows))
        print(summary)
    else:
        for row in outcome.rows:
            print(json.dumps(row if config.output.trace else traces.without(row), ensure_ascii=False))
        print(summary, file=sys.stderr)
    return jobs.exit_code(outcome)


def _table(prompts: "Sequence[Prompt]", rows: "Sequence[Row]") -> Table:
    """Prompts and answers for a reader."""
    table = Table("Prompt", "Answer", show_lines=True)
    for title in ("Tokens", "NFE", "Tokens/NFE"):
        table.add_column(title, justify="right")
    for prompt, row in zip(prompts, rows, strict=True):
        question = prompt.text or (prompt.messages[-1]["content"] if prompt.messages else str(prompt.prompt_ids))
        answer = str(row["output_ids"]) if row["text"] is None else row["text"]
        numbers = (str(row["num_tokens"]), str(row["nfe"]), f"{row['num_tokens'] / row['nfe']:.2f}")
        table.add_row(*map(Text, (question, answer, *numbers)))
    return table


if __name__ == "__main__":
    cli.run(main, description=__doc__ or "", default_config="vanilla")
