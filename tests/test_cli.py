"""Flags, help, error lines and exit codes, with a command that does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.errors import UsageError

ROOT = Path(__file__).parents[1]
VANILLA = str(ROOT / "configs" / "vanilla.py")
ON_BASE = """from configs import base
def get_config():
    config = base.get_config()
    config.decode.{}
    return config
"""


def execute(*flags: str, main=lambda config: None) -> int:
    return cli.execute(main, ["command", *flags], description="What it does.", default_config=VANILLA)


def error_line(capsys: pytest.CaptureFixture[str], *flags: str, main=lambda config: None) -> str:
    """The one line of a refused command."""
    assert execute(*flags, main=main) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def parsed(*flags: str) -> Config:
    seen: list[Config] = []
    assert execute(*flags, main=seen.append) == 0
    return seen[0]


def test_flags_override_the_config_file_in_any_order() -> None:
    config = parsed("--config.decode.gen_length=64", f"--config={VANILLA}", "--config.decode.temperature", "1")
    assert config.decode.gen_length == 64
    assert config.decode.temperature == 1.0
    assert config.decode.block_length == 32
    assert parsed("--config.decode.logits_eos_inf").decode.logits_eos_inf
    assert not parsed("--noconfig.model.verify").model.verify
    assert parsed("--config.input.prompt=--a=b: c").input.prompt == "--a=b: c"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.decode.gen_lenght=3", "unknown config field, close to --config.decode.gen_length"),
        ("--config.gen_length=3", "--config.gen_length: unknown config field, close to --config.decode.gen_length"),
        ("--config.decode.zzz=3", "--config.decode.zzz: unknown config field (see --help)"),
        ("--config.decode={}", "--config.decode: unknown config field"),
        ("--config.=3", "unknown config field"),
        ("--gen_length=3", "--gen_length: unknown flag, close to --config.decode.gen_length"),
        ("--helpfull", "--helpfull: unknown flag (see --help)"),
        ("gen_length=3", "expected only --flags, got 'gen_length=3'"),
        ("--config", "Missing value for flag --config"),
        ("--config.decode.steps", "Missing value for flag --config.decode.steps"),
        ("--config.decode.gen_length=many", "decode.gen_length: expected int, got 'many'"),
        ("--config.decode.gen_length=1.5", "decode.gen_length: expected int, got '1.5'"),
        ("--config.decode.temperature=", "decode.temperature: expected float, got ''"),
        ("--config.model.verify=maybe", "model.verify: expected bool, got 'maybe'"),
        ("--config.decode.gen_length=97", "decode.block_length: expected a divisor of decode.gen_length 97, got 32"),
        ("--config.decode.steps=31", "decode.steps: expected a multiple of the number of blocks 3, got 31"),
        ("--config=configs/none.py", "or a bundled experiment, got 'configs/none.py' (no such file in"),
        ("--config=configs", "or a bundled experiment, got 'configs' (no such file in"),
        ("--config=treshold", "got 'treshold' (no such file in"),
        ("--config=treshold", "; close to threshold, bundled: ablations/all, "),
        ("--config=configs/treshold.py", "close to threshold, "),
        ("--config=apd_dream2:x", "got 'apd_dream2' (no such file in"),
        ("--config=" + 300 * "x", "(no such file in"),
        ("--config=ablations/dico:none", "--config: ablations/dico, line "),
        ("--config=pyproject.toml", "expected a Python file, got 'pyproject.toml'"),
        ("--config=dllm_jax/errors.py", "AttributeError: module 'config_file' has no attribute 'get_config'"),
    ],
)
def test_bad_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str, expected: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert expected in error_line(capsys, flag)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def get_config(:\n", ", line 1: SyntaxError"),
        ("import no_such_module\n", ", line 1: ModuleNotFoundError"),
        ("def get_config():\n    return undefined\n", ", line 2: NameError"),
        ("def get_config():\n    return None\n", "to return a ConfigDict, got None"),
        (
            ON_BASE.format("polcy = 'x'"),
            "decode.polcy",
        ),
        (
            ON_BASE.format("gen_length = 'x'"),
            "line 4: TypeError",
        ),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'decode': 3})\n", "decode"),
    ],
)
def test_broken_config_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, code: str, expected: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code)
    assert expected in error_line(capsys, f"--config={path}")


def test_config_file_may_leave_sections_out_and_take_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(length='32'):\n"
        "    return ConfigDict({'decode': {'gen_length': int(length)}})\n"
    )
    assert parsed(f"--config={path}").decode.gen_length == 32
    assert parsed(f"--config={path}:64").decode.gen_length == 64


def test_the_name_of_a_bundled_experiment_is_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "threshold").mkdir()
    (tmp_path / "apd").write_text("no Python file is called so")
    assert parsed("--config=threshold") == parsed(f"--config={ROOT / 'configs' / 'threshold.py'}")
    assert parsed("--config", "apd").decode.policy == "apd"
    assert parsed("-config=ablations/apd:R0.25_W0").apd.mixture_weight == 0.25


def test_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(ON_BASE.format("seed = 4711"))
    paths = [name for name in cli.settings_of(Config) if name.endswith("path")]
    assert paths == ["model.path", "tokenizer.path", "input.path", "output.path", "verifier.path", "filter.path"]
    config = parsed("--config=~/own.py", *(f"--config.{name}=~/x y" for name in paths))
    assert config.decode.seed == 4711
    for name in paths:
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == f"{tmp_path}/x y"
    assert parsed("--config.model.path=llada-tiny").model.path == "llada-tiny"
    assert parsed("--config.input.path=a/~b").input.path == "a/~b"
    assert parsed("--config.input.prompt=~").input.prompt == "~"


def test_override_of_a_field_the_file_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({})\n")
    assert parsed(f"--config={path}", "--config.decode.gen_length=64").decode.gen_length == 64


def test_usage_error_of_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        raise UsageError("two\nlines")

    assert error_line(capsys, main=main) == "error: two lines\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_command_may_return_its_exit_code(returned: int | None, code: int) -> None:
    assert execute(main=lambda config: returned) == code


def test_other_failures_keep_their_traceback() -> None:
    def main(config: Config) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        execute(main=main)


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        raise KeyboardInterrupt

    assert execute(main=main) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("columns", [80, 120])
def test_help_lists_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert execute("--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does.")
    assert max(map(len, out.splitlines())) <= columns
    for name, field in cli.settings_of(Config).items():
        section, last = name.split(".")
        assert f"--config.{section}.*" in out
        assert f"\n  {last} " in out
        assert field.metadata["help"].split()[0] in out


def test_help_shows_the_values_of_the_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(ON_BASE.format("seed = 4711"))
    assert execute("-h", f"--config={path}") == 0
    assert "4711" in capsys.readouterr().out


def test_help_and_errors_need_no_jax() -> None:
    code = (
        "import sys; from decode import run; from dllm_jax import cli\n"
        "codes = [cli.execute(run.main, ['x', flag], description='', default_config='configs/vanilla.py')\n"
        "         for flag in ('--help', '--config.decode.gen_length=x')]\n"
        "assert codes == [0, 2] and 'jax' not in sys.modules, codes"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_interrupt_ends_the_process_at_once() -> None:
    code = (
        "import atexit; from dllm_jax import cli\n"
        "def main(config):\n"
        "    atexit.register(print, 'teardown')  # where JAX waits for a running computation\n"
        "    raise KeyboardInterrupt\n"
        "cli.run(main, description='', default_config='configs/vanilla.py')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m decode.run --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
