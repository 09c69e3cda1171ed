"""A one-layer copy of the bundled diffusion model, and training runs short enough for tests."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dllm_jax import cli
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.training.diffusion import train as diffusion
from dllm_jax.training.trainer import Trainer
from dllm_jax.training.verifier import train as verifier
from tests.checkpoints.folders import one_layer
from tests.training.commands import ROOT, SHORT, Command, Execute


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model without all but its first layer."""
    return one_layer(ASSETS / "llada-tiny", tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def arguments(command: Command, teacher: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Call it with settings: the command line of a short run that writes to tmp_path / "out"."""

    def line(*settings: str) -> list[str]:
        given = (*SHORT, *command.flags, f"model.path={teacher}", f"output.path={tmp_path / 'out'}", *settings)
        return [command.module, *(f"--config.{setting}" for setting in given)]

    return line


@pytest.fixture(scope="module", autouse=True)
def one_trainer_for_equal_settings() -> Iterator[None]:
    """Runs with the same settings share their compiled step, unless weights belong to it."""
    shared = functools.cache(Trainer)

    def make(*args: Any, **settings: Any) -> Trainer:
        return (Trainer if settings.get("adapter") else shared)(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        for module in (diffusion, verifier):
            patch.setattr(module, "Trainer", make)
        yield


@pytest.fixture
def execute(command: Command, arguments: Callable[..., list[str]]) -> Execute:
    """Call it with settings: runs the command in this process and returns its exit code."""

    def run(*settings: str) -> int:
        config = str(ROOT / "configs" / command.config)
        return cli.execute(
            command.main, arguments(*settings), description="", default_config=config, schema=command.schema
        )

    return run


@pytest.fixture
def refused(execute: Execute, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call it with settings: the one error line of a run that must not start."""

    def line(*settings: str) -> str:
        capsys.readouterr()  # what earlier runs said
        assert execute(*settings) == 2
        out, err = capsys.readouterr()
        assert (out, err[:7], err.count("\n")) == ("", "error: ", 1), err
        return err

    return line


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call it with the number of steps after which the machine fails; None for never."""
    step = Trainer.step

    def set_limit(steps: int | None) -> None:
        def limited(self: Trainer, state: Any, batch: Any) -> Any:
            if int(state.step) == steps:
                raise RuntimeError("power cut")
            return step(self, state, batch)

        monkeypatch.setattr(Trainer, "step", limited)

    return set_limit
