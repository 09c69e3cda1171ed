"""What the families share in reading a config.json."""

from collections.abc import Iterable, Mapping
from typing import Any

from dllm_jax.errors import UsageError


def require(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses a config.json without the fields named.

    Raises:
        UsageError: naming those that are missing.
    """
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise UsageError(f"config.json: expected the field(s) {', '.join(missing)}, got none")


def token_ids(fields: Mapping[str, Any], name: str, *, file: str = "config.json") -> tuple[int, ...]:
    """The token ids in a field: a number, a list of them, or nothing (null, [], and -1 as Llama's files write it).

    Args:
        fields: of the file.
        name: the field.
        file: its name, for the error.

    Raises:
        UsageError: something else.
    """
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise UsageError(f"{file} field {name}: expected a token id or a list of them, got {value!r}")
    return tuple(ids)


def first_token_id(fields: Mapping[str, Any], name: str) -> int:
    """The token id in a field of config.json, the first if it is a list.

    Raises:
        UsageError: there is none.
    """
    ids = token_ids(fields, name)
    if not ids:
        raise UsageError(f"config.json field {name}: expected a token id, got {fields.get(name)!r}")
    return ids[0]
