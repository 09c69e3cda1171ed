"""Distillation: a diffusion model's own answers, to learn from; a verifier will have to agree with them."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dllm_jax import hosts, jobs
from dllm_jax.config import Config
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.rows import Row
from dllm_jax.data.samples import OwnAnswer
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings, OutputSettings
from dllm_jax.training.settings import CorpusSettings

FIELD = "data.distill_path"


def wanted_answers(
    prompts: Sequence[Prompt], config: Config, *, data: CorpusSettings, overwrite: bool
) -> list[Row] | None:
    """`own_answers` of data.distill_path; None if that is empty."""
    if not data.distill_path:
        return None
    path = Path(data.distill_path).resolve()
    return own_answers(prompts, config, source=data.path, path=path, overwrite=overwrite)


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


def ended(rows: Sequence[Row], path: str) -> list[Row | None]:
    """The answers, with None for those that decode.gen_length cut off, which is told.

    Where what stands behind an answer is learnt as well, a model would learn from these to stop anywhere.

    Raises:
        UsageError: all of them were.
    """
    kept = [row if row["finish_reason"] != "length" else None for row in rows]
    missing = kept.count(None)
    if missing == len(rows):
        raise UsageError(f"{FIELD}: expected answers that end before decode.gen_length, got none")
    if missing:
        told = f"{missing} of {len(rows)} own answers fill decode.gen_length and are left out"
        print(f"{path}: {told}", file=sys.stderr)
    return kept


def digest(path: str, *, name: str = "answers") -> dict[str, str]:
    """What belongs to the identity of a training: the answers in a file, or texts, if they are wanted and there."""
    return hosts.from_first(lambda: _digest(Path(path), name)) if path else {}


def _digest(path: Path, name: str) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return {name: hashlib.file_digest(file, "sha256").hexdigest()}


def own_answer(row: Row) -> OwnAnswer:
    """The tokens of a decoded answer with the one that ends it; without one, if the answer filled the canvas."""
    length = row["num_tokens"] + 1
    return OwnAnswer(row["output_ids"][:length], row["commit_step"][:length])


def _complete(rows: list[Row], path: Path) -> list[Row]:
    """The rows, if every one is an answer to learn from."""
    failed = [row["id"] for row in rows if row["finish_reason"] == "error" or row.get("masks_left")]
    if failed:
        raise UsageError(f"{FIELD}: expected whole answers in {path}, got an error or masks in {failed[0]!r}")
    return rows
