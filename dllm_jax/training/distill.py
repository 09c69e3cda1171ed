"""Distillation: the diffusion model's own answers, which is what a verifier will have to agree with."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_jax import jobs
from dllm_jax.checkpoints.files import read_json
from dllm_jax.config import Config
from dllm_jax.data import tasks
from dllm_jax.data.outputs import Row, difference, replace_file
from dllm_jax.data.prompts import Prompt
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings, OutputSettings

SECTIONS = ("model", "tokenizer", "decode", "threshold")  # of the settings: what decides an answer


def own_answers(prompts: Sequence[Prompt], config: Config, *, path: Path, overwrite: bool) -> list[Row]:
    """Decodes an answer to every prompt, or reads the answers decoded earlier.

    Args:
        prompts: the questions; their answers are not used.
        config: how to decode.
        path: JSONL file of answers, as `decode.run` writes them, metrics beside it; the prompts go to PATH.prompts.
        overwrite: decode again if the answers there are of other settings or prompts.

    Returns:
        Output lines, in the order of the prompts.

    Raises:
        UsageError: the answers there are of other settings or prompts, decoding is refused, or an answer failed.
    """
    metrics = path.with_name(path.name + ".metrics.json")
    if path.is_file() and metrics.is_file():
        rows = tasks.read(path)
        change = _change(read_json(metrics), config) or (
            [row["id"] for row in rows] != _ids(prompts) and "other prompts"
        )
        if not change:
            return _complete(rows, path)
        if not overwrite:
            raise UsageError(
                f"data.distill_path: expected answers decoded with the same settings in {path}, "
                f"got {change} (output.overwrite=true decodes them again)"
            )
    questions = path.with_name(path.name + ".prompts")
    replace_file(questions, "".join(json.dumps(_line(prompt), ensure_ascii=False) + "\n" for prompt in prompts))
    job = jobs.prepare(
        dataclasses.replace(
            config, input=InputSettings(path=str(questions)), output=OutputSettings(path=str(path), overwrite=overwrite)
        )
    )
    result = jobs.decode(job)
    jobs.finish(job, result, scores={})
    return _complete(result.rows, path)


def answer_tokens(row: Row) -> list[int]:
    """The tokens of a decoded answer with the one that ends it; without one, if the answer filled the canvas."""
    return row["output_ids"][: row["num_tokens"] + 1]


def _complete(rows: list[Row], path: Path) -> list[Row]:
    """The rows, if every one is an answer to learn from."""
    failed = [row["id"] for row in rows if row["finish_reason"] == "error" or row.get("masks_left")]
    if failed:
        raise UsageError(f"data.distill_path: expected whole answers in {path}, got an error or masks in {failed[0]!r}")
    return rows


def _change(metrics: dict[str, Any], config: Config) -> str:
    """The first setting that differs from those of answers decoded earlier, "" if none."""
    wanted = {name: value for name, value in dataclasses.asdict(config).items() if name in SECTIONS}
    return difference(metrics.get("config", {}), wanted)


def _ids(prompts: Sequence[Prompt]) -> list[Any]:
    return [prompt.id for prompt in prompts]


def _line(prompt: Prompt) -> dict[str, Any]:
    """The input line of a prompt."""
    question = {"prompt": prompt.text, "messages": prompt.messages, "prompt_ids": prompt.prompt_ids}
    return {"id": prompt.id, **{name: value for name, value in question.items() if value is not None}}
