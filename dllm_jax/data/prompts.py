"""Reads prompts: a JSONL file, one string, or the built-in examples."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_jax.data import formats
from dllm_jax.data.lazy import Lazy
from dllm_jax.data.lines import Lines, open_lines
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings

BUILT_IN = Path(__file__).parents[1] / "assets" / "prompts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One input: exactly one of text, messages and prompt_ids is set."""

    index: int  # place in the whole input, counting lines left out; random draws depend on it
    line: int  # 1-based line of the file
    id: Any  # any JSON value; the index if the line has none
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None  # each with role and content; a last one of assistant goes on
    prompt_ids: tuple[int, ...] | None = None  # tokens, used as they are
    task: Any = None  # as the line has it: only who scores or learns looks at these two
    answer: Any = None
    doc: Mapping[str, Any] | None = None  # the whole line of a public data set, from which decode.eval words its prompt
    stop: tuple[str, ...] = ()  # the text ends before the first of these, as before those of output.stop


Check = Callable[[Prompt], Prompt | None]  # may put another prompt in the place of the one that it looks at


@dataclasses.dataclass
class BadLines:
    """What bad input does: `fail` raises at the first bad line, `skip` counts them."""

    source: str  # the file, for messages
    on_error: str  # input.on_error
    count: int = 0
    first: str = ""
    log: Callable[[int, str, bytes], object] | None = None  # with `skip`, takes number, error and text of each

    @contextlib.contextmanager
    def line(self, number: int, *, text: Callable[[], bytes] = lambda: b"") -> Iterator[None]:
        """Guards the work on one line; with `skip` a `UsageError` inside ends that work only.

        Args:
            number: of the line, from 1.
            text: gives the line.

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
            if self.log:
                self.log(number, str(error), text())

    def report(self, good: int) -> None:
        """Says on stderr how many lines were left out.

        Raises:
            UsageError: no good line is left.
        """
        if self.count:
            print(f"left out {self.count} bad input line(s); the first: {self.first}", file=sys.stderr)
        if not good:
            raise UsageError(f"{self.source}: expected at least one good line, got none")


class PromptFile(Lazy[Prompt]):
    """The prompts of a file, each read again when it is asked for: a few numbers are held of every line.

    Args:
        lines: of the file, none of them kept yet.
        check: see `read`.
    """

    def __init__(self, lines: Lines, check: Check | None) -> None:
        self._lines, self._check = lines, check
        self._numbers, self._indices = array("I"), array("I")  # of the kept lines: in the file, among the filled ones

    def scan(self, bad: BadLines, *, seen: Callable[[Prompt], None] | None = None) -> None:
        """Reads the whole file and keeps the good lines.

        Args:
            bad: what happens with malformed lines.
            seen: see `read`.

        Raises:
            UsageError: `bad` fails at a line.
        """
        for index, (offset, number, line) in enumerate(self._lines.scan()):
            with bad.line(number, text=functools.partial(bytes, line)):
                prompt = self._prompt(line, index=index, number=number)
                if seen:
                    seen(prompt)
                self._lines.keep(offset)
                self._numbers.append(number)
                self._indices.append(index)

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, place: int) -> Prompt:
        """Reads a prompt."""
        return self._prompt(self._lines.read(place), index=self._indices[place], number=self._numbers[place])

    def _prompt(self, line: bytes, *, index: int, number: int) -> Prompt:
        """The prompt of a line."""
        given: dict[str, Any] = {"id": index} | formats.fields(record(line))
        prompt = Prompt(index=index, line=number, **given)
        return self._check(prompt) or prompt if self._check else prompt

    def text(self, place: int) -> bytes:
        """The line of a prompt."""
        return self._lines.read(place)


def source(settings: InputSettings) -> str:
    """The name of the input in messages."""
    return "input.prompt" if settings.prompt else settings.path or "built-in prompts"


def read(
    settings: InputSettings,
    bad: BadLines,
    *,
    check: Check | None = None,
    seen: Callable[[Prompt], None] | None = None,
    field: str = "input.path",
) -> Sequence[Prompt]:
    """The prompts the settings ask for; blank lines are ignored.

    Args:
        settings: where from.
        bad: what happens with malformed lines.
        check: raises `UsageError` for lines that are no good for other reasons; a prompt that it returns counts
            instead.
        seen: gets all good prompts in their order.
        field: the setting the path came from, for errors.

    Returns:
        One prompt, or a `PromptFile`.

    Raises:
        UsageError: the file cannot be read or is empty, or `bad` fails at a line.
    """
    if settings.prompt:
        prompt = Prompt(index=0, line=1, id=0, text=formats.checked_text(settings.prompt, "input.prompt"))
        prompt = check(prompt) or prompt if check else prompt
        if seen:
            seen(prompt)
        return [prompt]
    prompts = PromptFile(open_lines(settings.path or str(BUILT_IN), field=field), check)
    prompts.scan(bad, seen=seen)
    if not prompts and not bad.count:
        raise UsageError(f"{field}: expected at least one line of JSON, got an empty file {settings.path!r}")
    if not prompts:
        bad.report(good=0)
    return prompts


def record(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        UsageError: it is none, or one that readers take differently.
    """
    try:
        text = line.decode("utf-8-sig")
        found = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
        )
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"expected UTF-8 text, got {error.reason}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a JSON object, got {formats.shorten(found)}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice in an object")
    return record


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is no finite number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > sys.get_int_max_str_digits() > 0:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
