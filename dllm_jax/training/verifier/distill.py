"""Distillation: the diffusion model's own answers, which is what a verifier will have to agree with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dllm_jax import hosts, jobs
from dllm_jax.config import Config
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.rows import Row
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings, OutputSettings

FIELD = "data.distill_path"


def own_answers(prompts: Sequence[Prompt], config: Config, *, source: str, path: Path, overwrite: bool) -> list[Row]:
    """Decodes an answer to every prompt, or reads the answers decoded earlier: a job like that of `decode.run`.

    Args:
        prompts: the questions; their answers are not used.
        config: how to decode.
        source: the file the prompts come from, "" if they are built in.
        path: JSONL file of answers, as `decode.run` writes them, metrics beside it.
        overwrite: decode again if the answers there are of other settings, prompts or weights.

    Returns:
        Output lines, in the order of the prompts.

    Raises:
        UsageError: the answers there are of another job, decoding is refused, or an answer failed.
    """
    settings = dataclasses.replace(
        config, input=InputSettings(path=source), output=OutputSettings(path=str(path), overwrite=overwrite)
    )
    outcome = jobs.run(settings, command="decode.run", prompts=prompts, field=FIELD)
    return _complete(hosts.from_first(lambda: list(outcome.rows)), path)


def answer_tokens(row: Row) -> list[int]:
    """The tokens of a decoded answer with the one that ends it; without one, if the answer filled the canvas."""
    return row["output_ids"][: row["num_tokens"] + 1]


def _complete(rows: list[Row], path: Path) -> list[Row]:
    """The rows, if every one is an answer to learn from."""
    failed = [row["id"] for row in rows if row["finish_reason"] == "error" or row.get("masks_left")]
    if failed:
        raise UsageError(f"{FIELD}: expected whole answers in {path}, got an error or masks in {failed[0]!r}")
    return rows
