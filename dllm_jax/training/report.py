"""What a training run tells: a progress bar on a terminal, lines of metrics, metrics.jsonl, TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.progress
from tensorboardX import SummaryWriter

from dllm_jax import hosts
from dllm_jax.data.outputs import replace_file
from dllm_jax.errors import naming
from dllm_jax.progress import for_people


class Reporter:
    """Writes the metrics of a run from the step on where it starts or continues; a context manager.

    Of several processes only the first writes.

    Args:
        folder: for metrics.jsonl and TensorBoard's files. Entries behind `start` come from a run that was interrupted
            later than its last checkpoint, and are dropped.
        start: steps that are done.
        steps: of the whole run.

    Attributes:
        has_measured: whether there are measurements of the step `start`.
    """

    def __init__(self, folder: Path, *, start: int, steps: int) -> None:
        self._lines = folder / "metrics.jsonl"
        self._board = None
        kept = hosts.from_first(lambda: _until(self._lines, start) if self._lines.exists() else [])
        self.has_measured = any(line["step"] == start and line["group"] == "held_out" for line in map(json.loads, kept))
        if hosts.is_first():
            if self._lines.exists():
                replace_file(self._lines, "".join(kept))
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._progress = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn(), **for_people()
        )
        self._bar = self._progress.add_task("training", total=steps, completed=start)
        self._steps = steps
        self._reset()

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._board:
            self._board.close()

    def step(self, metrics: Mapping[str, jax.Array], *, tokens: int) -> None:
        """Notes a step, without waiting for it.

        Args:
            metrics: scalars, still on the device.
            tokens: in its batch, padding left out.
        """
        self._recent.append(metrics)
        self._tokens += tokens
        self.advance(1)

    def advance(self, steps: int) -> None:
        """Moves the progress bar."""
        self._progress.advance(self._bar, steps)

    def training(self, step: int, *, learning_rate: float) -> None:
        """Writes the means over the steps since the last call."""
        recent = jax.device_get(self._recent)
        means = {name: float(np.mean([metrics[name] for metrics in recent])) for name in recent[0]}
        rate = self._tokens / (time.perf_counter() - self._since)
        self.write(step, means | {"learning_rate": learning_rate, "tokens_per_second": rate}, group="train")

    def held_out(self, step: int, measured: Mapping[str, float]) -> None:
        """Writes measurements, made right after `training`: their time does not count for its rate."""
        self.write(step, measured, group="held_out")

    def write(self, step: int, values: Mapping[str, float], *, group: str, aloud: bool = True) -> None:
        """Writes values of a step.

        Args:
            step: of the run.
            values: by name.
            group: what they have in common; TensorBoard shows a group together.
            aloud: also as a line on the terminal.
        """
        if aloud:
            told = ", ".join(f"{name} {_short(x)}" for name, x in values.items())
            self._progress.console.print(
                f"step {step}/{self._steps} {group}: {told}", soft_wrap=True, highlight=False, markup=False
            )
        if self._board:
            with naming(self._lines), self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "group": group, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.flush()
        self._reset()

    def _reset(self) -> None:
        self._recent: list[Mapping[str, Any]] = []
        self._tokens, self._since = 0, time.perf_counter()


def _until(path: Path, step: int) -> list[str]:
    """The lines of metrics up to a step, a torn one left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
