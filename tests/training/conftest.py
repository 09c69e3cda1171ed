"""A one-layer copy of the bundled diffusion model, and training runs short enough for tests."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dllm_jax import cli
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.training.verifier import train as training
from dllm_jax.training.verifier.config import VerifierTraining
from tests.checkpoints.folders import one_layer
from train.verifier import main

ROOT = Path(__file__).parents[2]
FLAGS = (
    "network.num_layers=1",
    "network.embed_dim=16",
    "network.mlp_dim=32",
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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model without all but its first layer."""
    return one_layer(ASSETS / "llada-tiny", tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def arguments(teacher: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Call it with settings: the command line of a short run that writes to tmp_path / "out"."""

    def command(*settings: str) -> list[str]:
        given = (*FLAGS, f"model.path={teacher}", f"output.path={tmp_path / 'out'}", *settings)
        return ["train.verifier", *(f"--config.{setting}" for setting in given)]

    return command


@pytest.fixture(scope="module", autouse=True)
def one_trainer_for_equal_settings() -> Iterator[None]:
    """Runs with the same settings share their compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Trainer", functools.cache(training.Trainer))
        yield


@pytest.fixture
def execute(arguments: Callable[..., list[str]]) -> Callable[..., int]:
    """Call it with settings: runs the command in this process and returns its exit code."""

    def run(*settings: str) -> int:
        config = str(ROOT / "configs" / "train_verifier.py")
        return cli.execute(main, arguments(*settings), description="", default_config=config, schema=VerifierTraining)

    return run


@pytest.fixture
def refused(execute: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call it with settings: the one error line of a run that must not start."""

    def line(*settings: str) -> str:
        capsys.readouterr()  # what earlier runs said
        assert execute(*settings) == 2
        out, err = capsys.readouterr()
        assert (out, err[:7], err.count("\n")) == ("", "error: ", 1), err
        return err

    return line
