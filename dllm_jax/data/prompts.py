"""Reads prompts: a JSONL file, one string, or the built-in examples."""

import contextlib
import dataclasses
import gzip
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_jax.data import formats
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings

BUILT_IN = Path(__file__).parents[1] / "assets" / "prompts.jsonl"
_GZIP = b"\x1f\x8b"  # how such a file begins


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
        check: raises `UsageError` for lines that are no good for other reasons; a prompt that it returns counts
            instead.
        field: the setting the path came from, for errors.

    Raises:
        UsageError: the file cannot be read or is empty, or `bad` fails at a line.
    """
    if settings.prompt:
        return [Prompt(index=0, line=1, id=0, text=formats.checked_text(settings.prompt, "input.prompt"))]
    prompts = []
    lines = _content(Path(settings.path or BUILT_IN), field=field).split(b"\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for index, (number, line) in enumerate(filled):
        with bad.line(number):
            given: dict[str, Any] = {"id": index} | formats.fields(_record(line))
            prompt = Prompt(index=index, line=number, **given)
            if check:
                prompt = check(prompt) or prompt
            prompts.append(prompt)
    if not filled:
        raise UsageError(f"{field}: expected at least one line of JSON, got an empty file {settings.path!r}")
    if not prompts:
        bad.report(good=0)
    return prompts


def _content(path: Path, *, field: str) -> bytes:
    """The bytes of a file, unpacked if they are gzipped."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{field}: expected a whole gzip file, got {str(path)!r} ({error})") from None
    except OSError as error:
        raise UsageError(f"{field}: expected a readable file, got {str(path)!r} ({error.strerror})") from None


def _record(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
        )
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"expected UTF-8 text, got {error.reason}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"expected a JSON object, got {formats.shorten(record)}")
    return record


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
