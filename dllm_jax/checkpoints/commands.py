"""What the commands of this package share: their own absl flags, one error line for mistakes, exit codes.

Exit codes are those of `dllm_jax/cli.py`; a bad checkpoint is bad usage.
"""

import os
from collections.abc import Callable, Sequence

from absl import flags

from dllm_jax import cli
from dllm_jax.errors import UsageError


def define_path(name: str, meaning: str, values: flags.FlagValues) -> None:
    """Adds a flag that is a path, in which `~` is the home folder."""
    flags.DEFINE(_Path(), name, "", meaning, flag_values=values)


class _Path(flags.ArgumentParser[str]):
    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def execute(
    main: Callable[[flags.FlagValues, list[str]], None], argv: Sequence[str], *, values: flags.FlagValues, usage: str
) -> int:
    """Parses `argv`, calls `main` with the flags and the positional arguments, and returns the exit code.

    Args:
        main: the command; the positional arguments are paths.
        argv: program name first.
        values: the flags it knows; --help is added.
        usage: what --help shows above them.
    """
    flags.DEFINE_boolean("help", False, "show this", short_name="h", flag_values=values)

    def body() -> None:
        try:
            arguments = [os.path.expanduser(path) for path in values(list(argv))[1:]]
        except flags.Error as error:
            raise UsageError(str(error)) from None
        if values.help:
            print(
                cli.usage(usage, argv[0]).strip(),
                *(f"  --{name}: {values[name].help}" for name in sorted(values) if len(name) > 1),
                sep="\n",
            )
        else:
            main(values, arguments)

    return cli.guarded(body)
