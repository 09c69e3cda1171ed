"""Reads prompts: a JSONL file, one string, or the built-in examples."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings

BUILT_IN = Path(__file__).parents[1] / "assets" / "prompts.jsonl"
_KINDS = ("prompt", "messages", "prompt_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One input: exactly one of text, messages and prompt_ids is set."""

    index: int  # place in the whole input, counting lines left out; random draws depend on it
    line: int  # 1-based line of the file
    id: Any  # any JSON value; the index if the line has none
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None  # each with role and content
    prompt_ids: tuple[int, ...] | None = None  # tokens, used as they are
    task: str | None = None
    answer: str | None = None


Check = Callable[[Prompt], object]


@dataclasses.dataclass
class BadLines:
    """What bad input does: `fail` raises at the first bad line, `skip` counts them."""

    source: str  # the file, for messages
    on_error: str  # input.on_error
    count: int = 0
    first: str = ""

    @contextlib.contextmanager
    def line(self, number: int) -> Iterator[None]:
        """Guards the work on one line; with `skip` a `UsageError` inside ends that work only.

        Raises:
            UsageError: with `fail`, the error with the file and the line in front.
        """
        try:
            yield
        except UsageError as error:
            message = f"{self.source}:{number}: {error}"
            if self.on_error == "fail":
                raise UsageError(message) from None
            self.count += 1
            self.first = self.first or message

    def report(self, good: int) -> None:
        """Says on stderr how many lines were left out.

        Raises:
            UsageError: no good line is left.
        """
        if self.count:
            print(f"left out {self.count} bad input line(s); the first: {self.first}", file=sys.stderr)
        if not good:
            raise UsageError(f"{self.source}: expected at least one good line, got none")


def source(settings: InputSettings) -> str:
    """The name of the input in messages."""
    return "input.prompt" if settings.prompt else settings.path or "built-in prompts"


def read(
    settings: InputSettings, bad: BadLines, *, check: Check | None = None, field: str = "input.path"
) -> list[Prompt]:
    """The prompts the settings ask for; blank lines are ignored.

    Args:
        settings: where from.
        bad: what happens with malformed lines.
        check: raises `UsageError` for lines that are no good for other reasons.
        field: the setting the path came from, for errors.

    Raises:
        UsageError: the file cannot be read or is empty, or `bad` fails at a line.
    """
    if settings.prompt:
        return [Prompt(index=0, line=1, id=0, text=settings.prompt)]
    try:
        lines = Path(settings.path or BUILT_IN).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{field}: expected a readable file, got {settings.path!r} ({error.strerror})") from None
    prompts = []
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for index, (number, line) in enumerate(filled):
        with bad.line(number):
            prompt = _prompt(_record(line), index=index, line=number)
            if check:
                check(prompt)
            prompts.append(prompt)
    if not filled:
        raise UsageError(f"{field}: expected at least one line of JSON, got an empty file {settings.path!r}")
    if not prompts:
        bad.report(good=0)
    return prompts


def _record(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"expected UTF-8 text, got {error.reason}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"expected a JSON object, got {_shorten(record)}")
    return record


def _prompt(record: dict[str, Any], *, index: int, line: int) -> Prompt:
    """A prompt from the fields of a line, checked."""
    if "question" in record and not any(kind in record for kind in _KINDS):
        record = record | {"prompt": record["question"]}  # as in GSM8K's files
    given = [kind for kind in _KINDS if kind in record]
    if len(given) != 1:
        raise UsageError(f"expected exactly one of {', '.join(_KINDS)}, got {' and '.join(given) or 'none'}")
    value = record[given[0]]
    checked: dict[str, Any] = {}
    if given == ["prompt"]:
        checked["text"] = _text(value)
    elif given == ["messages"]:
        checked["messages"] = _messages(value)
    else:
        checked["prompt_ids"] = _ids(value)
    for name in ("task", "answer"):
        checked[name] = record.get(name)
        if not isinstance(checked[name], str | None):
            raise UsageError(f"{name}: expected a string, got {_shorten(checked[name])}")
    return Prompt(index=index, line=line, id=record.get("id", index), **checked)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"prompt: expected a string that is not empty, got {_shorten(value)}")
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"messages: expected a list that is not empty, got {_shorten(value)}")
    for message in value:
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UsageError(f"messages: expected objects with strings role and content, got {_shorten(message)}")
    return tuple(value)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"prompt_ids: expected a list that is not empty, got {_shorten(value)}")
    for token in value:
        if type(token) is not int or token < 0:  # a bool is an int too
            raise UsageError(f"prompt_ids: expected integers from 0, got {_shorten(token)}")
    return tuple(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _shorten(value: Any) -> str:
    """A value in an error message."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."
