"""Small results of sweeps, made by hand in the form that decode.eval writes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_jax.config import Config
from dllm_jax.evals.metrics import summarize

Fields = dict[str, Any]


def row(number: int, *, steps: Sequence[int], tokens: int, correct: bool, text: str = "yes", **more: Any) -> Fields:
    """An output line; tasks take turns."""
    return {
        "id": number,
        "text": text,
        "num_tokens": tokens,
        "nfe": max(steps),
        "commit_step": list(steps),
        "finish_reason": "eos",
        "task": ("copy", "sort")[number % 2],
        "correct": correct,
        **more,
    }


def write(folder: Path, name: str, rows: Sequence[Fields], *, settings: Fields, **metrics: Any) -> None:
    """A finished variant, with settings by SECTION.FIELD."""
    config = dataclasses.asdict(Config())
    for field, value in settings.items():
        section, _, setting = field.partition(".")
        config[section][setting] = value
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    told = {
        **summarize(rows),
        "tokens_per_second": 10.0,
        "canvas_tokens_per_second": None,
        "decode_seconds": 1.5,
        "compile_seconds": 2.5,
        "dtype": "float32",
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "versions": {"python": "3.11.7"},
        "config": config,
        **metrics,
    }
    (folder / f"{name}.jsonl.metrics.json").write_text(json.dumps(told))
