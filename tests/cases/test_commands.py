"""The console command, from an empty directory, and `~` in the flags of the checkpoint commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_jax import __version__
from dllm_jax.__main__ import COMMANDS
from dllm_jax.checkpoints import convert, verify

ROOT = Path(__file__).parents[2]


def console(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`dllm-jax ARGUMENTS`, which an installed package starts with the same function."""
    start = "import sys; from dllm_jax.__main__ import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", start, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_help_lists_the_commands_and_version_is_the_packages(tmp_path: Path) -> None:
    done = console("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert told == set(COMMANDS)
    assert console("--version", cwd=tmp_path).stdout == f"dllm-jax {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_as_it_is_called(tmp_path: Path, name: str) -> None:
    done = console(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"dllm-jax {name} " in done.stdout
    assert "python -m" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: command line: expected a command, got none (one of run, eval, "),
        (["rum"], "error: command line: expected a command, got 'rum' (close to run; "),
        (["train_filter"], "error: command line: expected a command, got 'train_filter' (close to train-filter; "),
        (["--config=threshold"], "error: command line: expected a command, got '--config=threshold' (one of run, "),
        (["run", "--config=treshold"], "got 'treshold' (no such file in"),
        (["run", "--config.decode.gen_length=x"], "error: decode.gen_length: expected int, got 'x'"),
        (["convert", "--source=x"], "error: --target: expected a folder, got none"),
        (["verify"], "error: command line: expected one folder, got none"),
        (["sweep", "--config"], "error: Missing value for flag --config"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = console(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_a_bundled_experiment_decodes_from_anywhere(tmp_path: Path) -> None:
    shape = ("--config.decode.gen_length=8", "--config.decode.block_length=8")
    done = console("run", "--config=threshold", "--config.input.prompt=Copy: oak", *shape, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"commit_step": [1, ' in done.stdout
    assert not list(tmp_path.iterdir())


def test_tilde_is_the_home_folder_for_convert_and_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.main(["convert", "--source=verifier-tiny", "--target=~/x"]) == 0
    assert verify.main(["verify", "~/x"]) == 0
    assert convert.main(["convert", "--source", "~/x", "--target", "~/y", "--to=hf"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
    assert "error" not in capsys.readouterr().err
