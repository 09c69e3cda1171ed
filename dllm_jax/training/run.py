"""The folder of a training run that is not finished: its identity, its checkpoints, its metrics."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_jax import hosts
from dllm_jax.checkpoints.files import check_new_folder, read_json
from dllm_jax.checkpoints.fingerprint import check_apart, without_times
from dllm_jax.data.outputs import IDENTITY, difference, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.places import only_writer
from dllm_jax.training.settings import TrainingOutput

METRICS = "metrics.json"  # of the result


class RunFolder:
    """PATH.training beside the folder PATH that the run will write: what it needs to continue, and its metrics.

    Of several processes the first does all of it, where all others come too.

    Args:
        output: the settings.

    Raises:
        UsageError: PATH cannot be written, or is there without the identity of a run and output.overwrite is off.
    """

    def __init__(self, output: TrainingOutput) -> None:
        self.target = Path(output.path).resolve()
        self.folder = self.target.with_name(self.target.name + ".training")
        self.checkpoints = self.folder / "checkpoints"
        self._settings = self.folder / "settings.json"
        self._overwrite = output.overwrite
        self._result = _metrics(self.target / METRICS)
        if not self._result:
            self._check_target(overwrite=output.overwrite)

    def begin(self, identity: Mapping[str, Any], *, reported: Mapping[str, Any]) -> dict[str, Any] | None:
        """Looks at what earlier runs left; writes nothing.

        Args:
            identity: section -> field -> value of everything that decides what the checkpoints hold; JSON.
            reported: the same of what decides the rest of the result.

        Returns:
            The metrics of this run, if it is finished.

        Raises:
            UsageError: what is there is of another run, and output.overwrite is off.
        """
        hosts.same("settings, files and samples", without_times({**identity, **reported}), difference=difference)
        return hosts.from_first(lambda: self._begin(identity, reported))

    def _begin(self, identity: Mapping[str, Any], reported: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._result:
            change = difference(self._result[IDENTITY], {**identity, **reported})
            if not change:
                print(f"finished already: {self.target}", file=sys.stderr)
                return self._result
            if not self._overwrite:
                raise UsageError(
                    f"output.path: expected {self.target} to be the result of this run, got {change} "
                    "(output.overwrite=true replaces it)"
                )
            self._check_target(overwrite=True)
        self._change(identity)
        return None

    def open(self, identity: Mapping[str, Any]) -> None:
        """Makes the folder, or takes over that of an interrupted run with the same identity.

        Args:
            identity: section -> field -> value of everything that decides what the checkpoints hold; JSON.

        Raises:
            UsageError: the interrupted run had another one, and output.overwrite is off.
        """
        hosts.from_first(lambda: self._open(identity))

    def _open(self, identity: Mapping[str, Any]) -> None:
        if self._change(identity):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._settings, json.dumps(identity, indent=2) + "\n")

    def finish(self) -> None:
        """Drops what only an interrupted run needs; the metrics stay."""
        hosts.from_first(self._finish)

    def _finish(self) -> None:
        self._settings.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _change(self, identity: Mapping[str, Any]) -> str:
        """What an interrupted run has otherwise; it may be discarded."""
        found = read_json(self._settings) if self._settings.exists() else {}
        change = difference(found, identity)
        if found and change and not self._overwrite:
            raise UsageError(
                f"output.path: expected the interrupted run in {self.folder.name} to have the same settings, "
                f"got {change} (output.overwrite=true discards it)"
            )
        return change

    def _check_target(self, *, overwrite: bool) -> None:
        check_new_folder(self.target, overwrite=overwrite, field="output.path", switch="output.overwrite=true")


@contextlib.contextmanager
def opened(output: TrainingOutput, reads: Mapping[str, Path]) -> Iterator[RunFolder]:
    """The folder of a run, which no other process writes while the block runs.

    Args:
        output: the settings.
        reads: setting -> file or folder that the run reads.

    Raises:
        UsageError: it cannot be written, is something that the run reads, or another one writes it.
    """
    run = hosts.from_first(lambda: RunFolder(output))
    if not hosts.is_first():
        yield run
        return
    check_apart([run.target, run.folder], reads, field="output.path")
    with only_writer(run.target, field="output.path"):
        yield run


def _metrics(path: Path) -> dict[str, Any]:
    """The metrics of a finished run with its identity; {} if the file is not there or something else."""
    try:
        metrics = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get(IDENTITY), dict) else {}
