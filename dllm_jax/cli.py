"""Flag parsing shared by all commands: --help with every setting, one `error:` line for mistakes, exit codes.

Settings are `ml_collections.config_flags` (`--config=FILE`, `--config.section.field=value`). JAX is not imported here:
help and errors come at once, and the environment is set up before it starts.

Exit codes: 0; 2 for bad usage, configuration or input; 130 after Ctrl-C; other failures keep their traceback.
"""

import dataclasses
import difflib
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dllm_jax.config import Config, from_config_dict
from dllm_jax.errors import UsageError

# Set unless the user did: tokenizers come from local folders only, and transformers need not say that torch is missing.
_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(main: Callable[[Config], None], *, description: str, default_config: str) -> NoReturn:
    """Runs a command with the arguments of this process and exits.

    Args:
        main: the command; imports JAX only when called.
        description: what --help shows above the settings.
        default_config: the config file used without --config.
    """
    sys.exit(execute(main, sys.argv, description=description, default_config=default_config))


def execute(main: Callable[[Config], None], argv: Sequence[str], *, description: str, default_config: str) -> int:
    """Parses `argv` (program name first), calls `main` and returns the exit code; see `run`."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        config_file, wants_help, overrides = _split(argv, default_config)
        values = load_config_file(config_file)
        if wants_help:
            _print_help(description, config_file, from_config_dict(values))
        else:
            main(from_config_dict(_override(values, overrides)))
        sys.stdout.flush()
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush complains
        return 1
    return 0


def _split(argv: Sequence[str], default_config: str) -> tuple[str, bool, list[str]]:
    """The config file, whether help is wanted, and the rest of the command line (program name first)."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # look behind the values of flags that are not known yet
    flags.DEFINE_string("config", default_config, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        rest = values(list(argv), known_only=True)
    except flags.Error as error:
        raise UsageError(str(error)) from None
    return values.config, values.help, rest


def load_config_file(name: str) -> ConfigDict:
    """Calls `get_config()` of a config file; `file.py:text` calls `get_config("text")`.

    Args:
        name: path of a Python file, relative to the working directory. It may import the repository's `configs`.

    Raises:
        UsageError: there is no such file, it fails, or it has no get_config that returns a ConfigDict.
    """
    path, *arguments = name.split(":", 1)
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.append(root)
    if not Path(path).is_file():
        raise UsageError(f"--config: expected a configuration file, got {path!r} (no such file in {os.getcwd()})")
    try:
        values = _import(path).get_config(*arguments)
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise UsageError(f"--config: {path}{where}: {type(error).__name__}: {error}") from None
    if not isinstance(values, ConfigDict):
        raise UsageError(f"--config: expected get_config() of {path} to return a ConfigDict, got {values!r}")
    return values


def _import(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: expected a Python file, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _override(values: ConfigDict, argv: list[str]) -> ConfigDict:
    """The values with the command line's `--config.section.field=value` written over them."""
    known: dict[str, Any] = {name: field.type for name, field, _ in _settings(Config())}
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_known(match[1], known)
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=argv)
        positional = parsed(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(f"--{error.flagname}: unknown flag{_close(error.flagname, known)}") from None
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        if not match:
            raise UsageError(str(error)) from None
        raise UsageError(f"{match[1]}: expected {known[match[1]].__name__}, got {match[2]!r}") from None
    except (flags.Error, KeyError, AttributeError) as error:
        raise UsageError(str(error)) from None
    if positional:
        raise UsageError(f"command line: expected only --flags, got {positional[0]!r}")
    return parsed.config


def _check_known(field: str, known: dict[str, Any]) -> None:
    if field not in known:
        raise UsageError(f"--config.{field}: unknown config field{_close(field, known)}")


def _close(name: str, known: dict[str, Any]) -> str:
    """What may have been meant by a mistyped flag or config field."""
    last_names = {full.split(".")[-1]: full for full in known}
    matches = difflib.get_close_matches(name, known, cutoff=0.7)
    matches += [last_names[last] for last in difflib.get_close_matches(name.split(".")[-1], last_names, cutoff=0.7)]
    unique = list(dict.fromkeys(f"--config.{match}" for match in matches))
    return f", close to {', '.join(unique)}" if unique else " (see --help)"


def _settings(config: Config) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Name, field and value of every setting."""
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        for field in dataclasses.fields(settings):
            yield f"{section.name}.{field.name}", field, getattr(settings, field.name)


def _print_help(description: str, config_file: str, config: Config) -> None:
    """Every setting by section: name, its value in the config file, meaning."""
    console = Console(highlight=False)
    console.width = min(max(console.width, 80), 120)
    console.print(Text(f"{description.strip()}\n\nSettings, with their values in {config_file}:"))
    for name, settings in itertools.groupby(_settings(config), key=lambda setting: setting[0].split(".")[0]):
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=16)
        table.add_column(min_width=10, max_width=24, overflow="fold")
        table.add_column()
        for full_name, field, value in settings:
            choices = ", ".join(field.metadata["choices"])
            meaning = field.metadata["help"] + (f" [{choices}]" if choices else "")
            table.add_row(*map(Text, (full_name.split(".")[1], str(value) if value != "" else '""', meaning)))
        console.print(Text(f"\n--config.{name}.*  {type(getattr(config, name)).__doc__}", style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))
