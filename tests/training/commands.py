"""Training commands as tests run them, and what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SHORT = (
    "data.samples=100",
    "data.eval_samples=5",
    "decode.gen_length=16",
    "decode.block_length=16",
    "decode.batch_size=8",
    "mesh.data=1",
    "train.steps=6",
    "train.batch_size=2",
    "train.warmup_steps=1",
    "train.log_every=2",
    "train.eval_every=4",
    "train.checkpoint_every=2",
)
FROM_FOLDER = (  # the model of model.path, instead of the one from scratch of configs/train_tiny_cpu.py
    "network.scratch=false",
    *(f"network.{name}=0" for name in ("num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length")),
)

Execute = Callable[..., int]
Refused = Callable[..., str]


class Command(NamedTuple):
    """A command that trains."""

    module: str
    main: Callable[[Any], None]
    config: str  # file in configs/
    schema: type
    flags: tuple[str, ...] = ()  # what makes its runs short, besides SHORT


def weights(folder: Path) -> bytes:
    """The weights that a run wrote."""
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those that depend on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
