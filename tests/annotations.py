"""How annotations of the package are checked while tests run: arguments and results, with dtypes and shapes."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float, as for static checkers


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with checks, unless it fills the fields of an object.

    A tree operation of JAX makes dataclasses whose leaves are shapes, shardings or None instead of arrays.
    """
    return function if function.__name__ == "__init__" else _checked(function)
