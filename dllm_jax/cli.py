"""Flag parsing shared by all commands: --help with every setting, one `error:` line for mistakes, exit codes.

Settings are `ml_collections.config_flags` (`--config=FILE` or the name of a bundled experiment,
`--config.section.field=value`). JAX is not imported here: help and errors come at once, and the environment is set up
before it starts.

Exit codes: 0, also after SIGTERM where a job can go on, which a line on stderr says; 1 for rows that ended with an
error, or a fault of the machine (no space, read-only, too many open files), told in one line with the path; 2 for bad
usage, configuration or input, or what does not fit into memory; 130 after Ctrl-C. Whatever else goes wrong is a mistake
of ours and keeps its traceback.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dllm_jax import hosts
from dllm_jax.config import Config, build, read_section, to_config_dict
from dllm_jax.errors import Stopped, UsageError, naming
from dllm_jax.settings import DistributedSettings, blocks_table, policy_table

PROGRAM = "dllm-jax"  # the console command of an installed package
_BUNDLED = Path(__file__).parent / "bundled"
# Where configs/, decode/ and train/ lie: inside the package in a wheel (see setup.py), beside it in a clone.
ROOT = _BUNDLED if _BUNDLED.is_dir() else _BUNDLED.parents[1]
FAULT, INTERRUPTED = 1, 130  # exit codes: the machine failed; Ctrl-C
# Faults of the machine whatever was open; others are that only if they name a file.
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)
COMPILATION_CACHE = "~/.cache/dllm_jax/programs"
# Set unless the user did: tokenizers come from local folders only, and transformers need not say that torch is missing.
_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_XLA_FLAG = "--xla_gpu_enable_triton_gemm"


def settings_of(schema: type[Any]) -> dict[str, Any]:
    """The dataclass field of every setting of a command, by its full name."""
    return {
        f"{section.name}.{field.name}": field
        for section in dataclasses.fields(schema)
        for field in dataclasses.fields(getattr(schema(), section.name))
    }


def run(
    main: Callable[[Any], int | None],
    *,
    description: str,
    default_config: str,
    schema: type[Any] = Config,
    others: Sequence[type[Any]] = (),
) -> NoReturn:
    """Runs a command with the arguments of this process and exits.

    Args:
        main: the command; imports JAX only when called. It may return an exit code (None is 0).
        description: what --help shows above the settings.
        default_config: the experiment used without --config.
        schema: the dataclass of the command's settings, which `main` gets.
        others: of which the experiment may be instead, if only one of them has all of its sections.
    """
    leave(execute(main, sys.argv, description=description, default_config=default_config, schema=schema, others=others))


def leave(code: int) -> NoReturn:
    """Ends the process.

    After a failure at once: a normal exit waits for the running computation, or crashes under its threads.
    """
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    hosts.stop()
    sys.exit(0)


def execute(
    main: Callable[[Any], int | None],
    argv: Sequence[str],
    *,
    description: str,
    default_config: str,
    schema: type[Any] = Config,
    others: Sequence[type[Any]] = (),
) -> int:
    """Parses `argv` (program name first), calls `main` and returns the exit code; see `run`."""

    def body() -> int | None:
        given, overrides = split(argv, default_config)
        _prepare_environment(compilation_cache=given.compilation_cache)
        chosen, values = _read_experiment(given.config, (schema, *others))
        if given.help:
            _print_help(usage(description, argv[0]), given.config, values, chosen)
            return 0
        values = _override(values, overrides, chosen)
        _prefer_cublas(values)
        hosts.start(read_section(DistributedSettings, values, "distributed"))
        return main(build(chosen, values))

    return guarded(body)


def guarded(body: Callable[[], int | None]) -> int:
    """Calls `body` and returns the exit code, its own (None is 0) or that of a mistake, told in one line on stderr.

    With several processes (`dllm_jax/hosts.py`) code and line are the same for all.
    """
    return hosts.conclude(*_outcome(body))


def _outcome(body: Callable[[], int | None]) -> tuple[int, str]:
    """Calls `body`; its exit code, and what is to be told."""
    try:
        code = body()
        with naming("standard output"):
            sys.stdout.flush()
    except UsageError as error:
        return 2, f"error: {_in_one_line(error)}"
    except Stopped as stopped:
        return 0, _in_one_line(stopped)
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted"
    except BrokenPipeError:
        _drop_output()
        return FAULT, ""
    except MemoryError as error:
        return FAULT, f"error: out of memory: {_in_one_line(error) or 'no more is there'}"
    except Exception as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_THE_MACHINE):
            if error.filename is None or error.filename == "standard output":
                _drop_output()
            return FAULT, f"error: {error.filename or 'a file or the standard output'}: {error.strerror}"
        if hosts.blames_others(error):
            return 0, ""
        if not hosts.several():
            raise
        traceback.print_exc(file=sys.__stderr__)  # of this process; the others are told in a line
        return FAULT, f"error: {type(error).__name__}: {_in_one_line(error)}"
    return code or 0, ""


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _drop_output() -> None:
    """Lets the interpreter's last flush of what cannot be written succeed."""
    with contextlib.suppress(OSError):  # not every stream is a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require(*packages: str, extra: str) -> None:
    """Refuses to go on without the packages of an optional extra.

    Raises:
        UsageError: naming the extra.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"packages: expected those of pip install 'dllm_jax[{extra}]', got no {', '.join(missing)}")


def _prepare_environment(*, compilation_cache: str) -> None:
    """What has to be in the environment before JAX starts; what the user set stays."""
    wanted = dict(_ENVIRONMENT)
    if compilation_cache:
        folder = os.path.expanduser(compilation_cache)
        wanted |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _prefer_cublas(values: ConfigDict) -> None:
    """Turns Triton's matrix products off, unless the user set them or weights are quantized.

    cuBLAS reads the weights of a small batch faster; but only Triton reads integers without a converted copy of them.
    """
    flags_given = os.environ.get("XLA_FLAGS", "")
    quantized = values.get("model", {}).get("quantize", "")
    if _XLA_FLAG not in flags_given and not quantized:
        os.environ["XLA_FLAGS"] = f"{flags_given} {_XLA_FLAG}=false".strip()


def split(argv: Sequence[str], default_config: str) -> tuple[flags.FlagValues, list[str]]:
    """The flags that are no settings (config, compilation_cache, help), and the rest of the command line.

    Args:
        argv: program name first, as in the rest that is returned.
        default_config: the experiment used without --config.

    Raises:
        UsageError: a flag lacks its value, or has a bad one.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # look behind the values of flags that are not known yet
    flags.DEFINE_string("config", default_config, "", flag_values=values)
    flags.DEFINE_string("compilation_cache", COMPILATION_CACHE, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        rest = values(list(argv), known_only=True)
    except flags.Error as error:
        raise UsageError(str(error)) from None
    return values, rest


def _read_experiment(name: str, schemas: Sequence[type[Any]]) -> tuple[type[Any], ConfigDict]:
    """Calls `get_config()` of an experiment, `get_config("text")` for `NAME:text`, and fills in what it leaves out.

    Args:
        name: see `config_module`, with or without `:text`.
        schemas: dataclasses of settings; the first that has all sections of the experiment is it, else the first.

    Returns:
        The schema and the settings.

    Raises:
        UsageError: there is no such file, it fails, or it has no get_config that returns a ConfigDict.
    """
    path, *arguments = name.split(":", 1)
    module = config_module(path)
    with _told_in_one_line(path, module.__file__):
        given = module.get_config(*arguments)
        if not isinstance(given, ConfigDict):
            raise UsageError(f"--config: expected get_config() to return a ConfigDict, got {given!r}")
        chosen = next((schema for schema in schemas if set(given) <= set(to_config_dict(schema()))), schemas[0])
        return chosen, _fill(given, chosen)


def experiments() -> dict[str, Path]:
    """The files of the bundled experiments by name: path in `configs`, without .py."""
    folder = ROOT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.py"))}


def config_module(name: str) -> ModuleType:
    """The Python module of an experiment.

    Args:
        name: a bundled experiment ("threshold", "ablations/apd"), else a Python file, relative to the working
            directory. The file may import the bundled `configs`.

    Raises:
        UsageError: there is no such file, or it fails.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    bundled = experiments()
    file = os.path.abspath(bundled.get(name, os.path.expanduser(name)))
    if not os.path.isfile(file):
        close = difflib.get_close_matches(name.removeprefix("configs/").removesuffix(".py"), bundled, n=1, cutoff=0.7)
        raise UsageError(
            f"--config: expected a configuration file or a bundled experiment, got {name!r} (no such file in "
            f"{os.getcwd()}; {f'close to {close[0]}, ' if close else ''}bundled: {', '.join(bundled)})"
        )
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: expected a Python file, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    with _told_in_one_line(name, file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _told_in_one_line(name: str, file: str | None) -> Iterator[None]:
    """Makes a failure of a configuration file a `UsageError` that names the line of the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise UsageError(f"--config: {name}{where}: {type(error).__name__}: {error}") from None


def _fill(given: ConfigDict, schema: type[Any]) -> ConfigDict:
    """The defaults with the values given written over them; types are checked, unknown names kept for later."""
    values = to_config_dict(schema())
    for name, section in given.items():
        if name in values and isinstance(section, ConfigDict):
            values[name].update(section)
        else:
            values[name] = section
    return values


def changed(config: Config, assignments: Sequence[str]) -> Config:
    """The settings with others written over them.

    Args:
        config: all settings.
        assignments: `section.field=value`, as behind `--config.`.

    Raises:
        UsageError: an unknown setting, or a value that is wrong by itself or with the others.
    """
    flags_given = [PROGRAM, *(f"--config.{assignment}" for assignment in assignments)]
    return build(Config, _override(to_config_dict(config), flags_given, Config))


def _override(values: ConfigDict, argv: list[str], schema: type[Any]) -> ConfigDict:
    """The values with the command line's `--config.section.field=value` written over them."""
    known = settings_of(schema)
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and match[1] not in known:
            raise UsageError(f"--config.{match[1]}: unknown config field{_close(match[1], known)}")
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
        raise UsageError(f"{match[1]}: expected {known[match[1]].type.__name__}, got {match[2]!r}") from None
    except (flags.Error, KeyError, AttributeError) as error:
        raise UsageError(str(error)) from None
    if positional:
        raise UsageError(f"command line: expected only --flags, got {positional[0]!r}")
    for name, field in known.items():
        flag = f"config.{name}"
        if field.metadata["filled"] and flag in parsed and parsed[flag].present and not parsed[flag].value:
            raise UsageError(f"{name}: expected text that is not empty, got --{flag}=")
    return parsed.config


def _close(name: str, known: Collection[str]) -> str:
    """What may have been meant by a mistyped flag or config field: settings with a similar last name."""
    last_names = {full.split(".")[-1] for full in known}
    similar = difflib.get_close_matches(name.split(".")[-1], last_names, cutoff=0.7)
    candidates = [full for full in known if full.split(".")[-1] in similar]
    matches = difflib.get_close_matches(name, candidates, cutoff=0)
    return f", close to {', '.join(f'--config.{match}' for match in matches)}" if matches else " (see --help)"


def usage(description: str, program: str) -> str:
    """What a command says about itself, with `dllm-jax NAME` in the place of `python -m MODULE` if started so."""
    return re.sub(r"python -m [\w.]+", program, description) if program.startswith(f"{PROGRAM} ") else description


def _print_help(description: str, config_file: str, values: ConfigDict, schema: type[Any]) -> None:
    """Every setting by section: name, its value in the config file, meaning."""
    console = Console(highlight=False)
    console.width = min(max(console.width, 80), 120)
    paragraphs = re.sub(r"(?<=\S)\n(?=\S)", " ", description.strip())
    cache = f"compiled programs are kept here between runs; empty for nowhere (default: {COMPILATION_CACHE})"
    console.print(Text(f"{paragraphs}\n"))
    console.print(
        Text(f"--config=NAME  a bundled experiment: {', '.join(experiments())}; or a Python file like theirs")
    )
    console.print(Text(f"--compilation_cache=FOLDER  {cache}"))
    if schema is Config:
        console.print(Text("\nWhat goes together, by decode.policy, and the caches of every kind of decode.blocks:"))
        console.print(Padding(_columns(("policy", "cache", "blocks", "stop"), policy_table()), (0, 0, 0, 2)))
        console.print(Padding(_columns(("blocks", "cache"), blocks_table()), (1, 0, 0, 2)))
    console.print(Text(f"\nSettings, with their values in {config_file}:"))
    for section in dataclasses.fields(schema):
        defaults = getattr(schema(), section.name)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=16)
        table.add_column(min_width=10, max_width=24, overflow="fold")
        table.add_column()
        for field in dataclasses.fields(defaults):
            value = values[section.name][field.name]
            choices = ", ".join(field.metadata["choices"])
            meaning = field.metadata["help"] + (f" [{choices}]" if choices else "")
            table.add_row(*map(Text, (field.name, str(value) if value != "" else '""', meaning)))
        console.print(Text(f"\n--config.{section.name}.*  {type(defaults).__doc__}", style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))


def _columns(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of text."""
    table = Table.grid(padding=(0, 2))
    for _ in heads:
        table.add_column(overflow="fold")
    for line in (heads, *lines):
        table.add_row(*map(Text, line))
    return table
