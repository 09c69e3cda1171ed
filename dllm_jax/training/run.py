"""The folder of a training run that is not finished: its settings, its checkpoints, its metrics."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_jax.checkpoints.files import check_new_folder, read_json
from dllm_jax.data.outputs import difference, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.training.config import TrainingOutput


class RunFolder:
    """PATH.training beside the folder PATH that the run will write: what it needs to continue, and its metrics.

    Args:
        output: the settings.

    Raises:
        UsageError: PATH exists, and output.overwrite is off.
    """

    def __init__(self, output: TrainingOutput) -> None:
        self.target = Path(output.path).resolve()
        self.folder = self.target.with_name(self.target.name + ".training")
        self.checkpoints = self.folder / "checkpoints"
        self._settings = self.folder / "settings.json"
        self._overwrite = output.overwrite
        check_new_folder(self.target, overwrite=output.overwrite, field="output.path", switch="output.overwrite=true")

    def open(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or takes over that of an interrupted run with the same settings.

        Args:
            settings: section -> field -> value of everything that decides the result; JSON.

        Raises:
            UsageError: the interrupted run had other settings, and output.overwrite is off; or no folder can be made.
        """
        found = read_json(self._settings) if self._settings.exists() else {}
        change = difference(found, json.loads(json.dumps(settings)))
        if found and change and not self._overwrite:
            raise UsageError(
                f"output.path: expected the interrupted run in {self.folder.name} to have the same settings, "
                f"got {change} (output.overwrite=true discards it)"
            )
        try:
            if change:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._settings, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"output.path: expected a place to write {self.folder}, got {error.strerror}") from None

    def finish(self) -> None:
        """Drops what only an interrupted run needs; the metrics stay."""
        self._settings.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
