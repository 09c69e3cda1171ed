"""The results of a sweep on disk: what every variant was, and what it did on every sample. No JAX."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllm_jax.config import Config
from dllm_jax.data.results import METRICS, PARTIAL, SHARDS
from dllm_jax.data.rows import Row
from dllm_jax.errors import UsageError

LINES = ".jsonl"
AXES = ("policy", "blocks", "cache", "stop")  # of `decode`: what makes a method; numbers are its settings
PLAIN = {"blocks": "aligned", "cache": "none", "stop": "none"}
UNTOLD = ("input", "output", "distributed", "bench", "plan", "mesh", "eval")  # sections that are no part of a method
NEEDED = ("task", "correct", "nfe", "num_tokens", "commit_step")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of decoding, and what came out.

    Attributes:
        name: in the sweep.
        metrics: of `decode.eval`.
        rows: the output lines, in input order.
    """

    name: str
    metrics: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def method(self) -> str:
        """What its structure is called: the policy, and of blocks, cache and stop rule those that are not plain."""
        decode = self.metrics["config"]["decode"]
        untold = ("window", "auto")  # only APD has a window, and no other cache; auto is what the model has
        special = [f"{decode[axis]} {axis}" for axis, plain in PLAIN.items() if decode[axis] not in (plain, *untold)]
        return ", ".join([decode["policy"], *special])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are not the defaults, by SECTION.FIELD."""
        defaults = dataclasses.asdict(Config())
        return {
            f"{section}.{field}": value
            for section, fields in self.metrics["config"].items()
            if section not in UNTOLD
            for field, value in fields.items()
            if value != defaults.get(section, {}).get(field)
        }

    @property
    def told(self) -> str:
        """Its settings in a line."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def keys(self) -> list[str]:
        """What the samples are known by: task and id, as JSON."""
        return [json.dumps([row["task"], row["id"]], ensure_ascii=False, sort_keys=True) for row in self.rows]

    def numbers(self, field: str) -> np.ndarray:
        """A number of every sample, float64 [S]: correct, nfe, num_tokens."""
        return np.array([row[field] for row in self.rows], np.float64)


def read_variant(path: Path) -> Variant:
    """The finished results of a variant.

    Args:
        path: the file of its output lines, or what that would be called if it were not in several.

    Raises:
        UsageError: they are not there, or not what `decode.eval` writes.
    """
    try:
        metrics = json.loads(path.with_name(path.name + METRICS).read_bytes())
        files = [path.with_name(part["name"]) for part in metrics.get(SHARDS, [])] or [path]
        rows = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: expected results with {METRICS} beside them, got {error}") from error
    if (
        "accuracy" not in metrics
        or not rows
        or not all(isinstance(row, dict) and row.keys() >= {"id", *NEEDED} for row in rows)
    ):
        raise UsageError(f"{path}: expected scored results of decode.eval, got something else")
    return Variant(path.name.removesuffix(LINES), metrics, rows)


def read_folder(folder: Path) -> tuple[list[Variant], list[str]]:
    """All variants of a sweep.

    Args:
        folder: where `decode.sweep` wrote.

    Returns:
        The finished ones in the order of their tokens per forward, and the names of those that were cut off.

    Raises:
        UsageError: there are none, or files that are no results.
    """
    if not folder.is_dir():
        raise UsageError(f"command line: expected the folder of a sweep, got {str(folder)!r}")
    paths = [path.with_name(path.name.removesuffix(METRICS)) for path in sorted(folder.glob(f"*{LINES}{METRICS}"))]
    found = [read_variant(path) for path in paths]
    if not found:
        raise UsageError(f"{folder}: expected the results of decode.sweep, got no finished variant")
    names = {variant.name for variant in found}
    unfinished = [path.name.removesuffix(LINES + PARTIAL) for path in sorted(folder.glob(f"*{LINES}{PARTIAL}"))]
    found.sort(key=lambda variant: (variant.metrics["tokens_per_forward"], variant.name))
    return found, [name for name in unfinished if name not in names]


def tidy(variant: Variant) -> Iterator[dict[str, Any]]:
    """A row per sample: what decoded it, what it was, what came out and what it took."""
    config = variant.metrics["config"]
    fixed = {
        "variant": variant.name,
        "method": variant.method,
        **{axis: config["decode"][axis] for axis in AXES},
        "settings": json.dumps(variant.settings),
        **{name: config["decode"][name] for name in ("gen_length", "block_length", "batch_size", "seed")},
        "dtype": variant.metrics["dtype"],
        "platform": variant.metrics["device"]["platform"],
    }
    for row in variant.rows:
        answer = slice(0, row["num_tokens"])
        confidence = row["confidence"][answer] if row.get("confidence") else []
        yield {
            **fixed,
            "id": json.dumps(row["id"], ensure_ascii=False),
            "task": row["task"],
            "correct": bool(row["correct"]),
            "num_tokens": row["num_tokens"],
            "nfe": row["nfe"],
            "tokens_per_forward": row["num_tokens"] / row["nfe"],
            "committed": sum(step > 0 for step in row["commit_step"]),
            "finish_reason": row["finish_reason"],
            "masks_left": row.get("masks_left", 0),
            "least_confidence": min(confidence, default=None),
            "mean_confidence": sum(confidence) / len(confidence) if confidence else None,
            "text": row["text"],
        }
