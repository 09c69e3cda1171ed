"""What a section of settings is: a frozen dataclass whose fields know their help, their choices and their bounds."""

import dataclasses
import math
from typing import Any, TypeVar

from dllm_jax.errors import UsageError

T = TypeVar("T")


def setting(
    default: T,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    filled: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> T:
    """A dataclass field for a setting.

    Args:
        default: its value if none is given.
        help_text: its line of --help.
        choices: for a string, the values it may take.
        filled: given on the command line it must not be empty: that is a script's unset variable, not a wish for the
            default.
        least: the least value, itself allowed.
        above: a bound below all values.
        most: the largest value, itself allowed.
        below: a bound above all values.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"help": help_text, "choices": choices, "filled": filled, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """A section of settings. A subclass is a frozen dataclass and may check more than its fields one by one."""

    def check(self, name: str, config: Any) -> None:
        """Checks values, and how they go together with the rest.

        Args:
            name: of the section in the configuration.
            config: all settings of the command.

        Raises:
            UsageError: naming the field, what was expected and what came.
        """


def check_fields(name: str, section: Any) -> None:
    """Checks every setting of a section on its own: one of its choices, a finite number within its bounds, text.

    Raises:
        UsageError: naming the field.
    """
    for field in dataclasses.fields(section):
        value, full, known = getattr(section, field.name), f"{name}.{field.name}", field.metadata
        if known["choices"] and value not in known["choices"]:
            raise UsageError(f"{full}: expected one of {', '.join(known['choices'])}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{full}: expected a finite number, got {value}")
        if isinstance(value, str) and not is_text(value):  # a byte of the command line that is no UTF-8
            raise UsageError(f"{full}: expected UTF-8 text, got {value!r}")
        if field.name == "seed" and not 0 <= value < 2**32:  # further bits would be dropped
            raise UsageError(f"{full}: expected 0 to {2**32 - 1}, got {value}")
        _check_bounds(full, value, **{bound: known[bound] for bound in ("least", "above", "most", "below")})


def _check_bounds(
    full: str, value: Any, *, least: float | None, above: float | None, most: float | None, below: float | None
) -> None:
    is_low = (least is not None and value < least) or (above is not None and value <= above)
    is_high = (most is not None and value > most) or (below is not None and value >= below)
    if not (is_low or is_high):
        return
    low = f"at least {least}" if least is not None else f"above {above}"
    high = f"at most {most}" if most is not None else f"below {below}"
    if most is None and below is None:
        expected = low
    elif least is not None and most is not None:
        expected = f"{least} to {most}"
    else:
        expected = f"{low} and {high}"
    raise UsageError(f"{full}: expected {expected}, got {value}")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def numbers(field: str, text: str) -> tuple[int, ...]:
    """The positive numbers in a setting, separated by commas.

    Raises:
        UsageError: one of them is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{field}: expected positive numbers like 1,8, got {text!r}")
    return tuple(map(int, parts))


def token_ids(field: str, text: str) -> tuple[int, ...]:
    """The token ids in a setting, separated by commas.

    Raises:
        UsageError: one of them is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{field}: expected token ids like 198,13, got {text!r}")
    return tuple(map(int, parts))


def at_least(field: str, value: float, bound: float) -> None:
    """Refuses a setting below its bound."""
    if value < bound:
        raise UsageError(f"{field}: expected at least {bound}, got {value}")
