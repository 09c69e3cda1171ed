"""The checkpoint folders of the cases, and the commands run in this process: what a case costs is its own work."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from decode import eval as decode_eval
from decode import run as decode_run
from dllm_jax import cli
from dllm_jax.checkpoints.load import ASSETS

ROOT = Path(__file__).parents[2]
JSONL = Path(__file__).parent / "jsonl"
COMMANDS = {"run": decode_run.main, "eval": decode_eval.main}


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that `make_checkpoints.py` writes."""
    target = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).parent / "make_checkpoints.py"
    subprocess.run([sys.executable, str(script), str(ASSETS), str(target)], check=True)
    return target


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call it with settings (`decode.policy=threshold`) and flags; `command` and `config` choose what runs."""

    def call(*settings: str, command: str = "run", config: str = "vanilla") -> Ran:
        flags = [setting if setting.startswith("-") else f"--config.{setting}" for setting in settings]
        default = str(ROOT / "configs" / f"{config}.py")
        code = cli.execute(COMMANDS[command], [command, *flags], description="", default_config=default)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call
