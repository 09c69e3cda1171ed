"""When an answer counts as correct, task by task."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from dllm_jax import cli
from dllm_jax.data.tasks import PAIRS
from dllm_jax.errors import UsageError
from dllm_jax.evals import maths, numbers, programs
from dllm_jax.evals.sandbox import CodeLimits

_STATED = re.compile(r"answer is (-?\d+)")
LIMITS = CodeLimits()


def same_stated_number(text: str, answer: str) -> bool:
    """The last number after "answer is" is the reference's; the way there does not count."""
    got, wanted = _STATED.findall(text), _STATED.findall(answer)
    return bool(got and wanted) and int(got[-1]) == int(wanted[-1])


def same_words(text: str, answer: str) -> bool:
    """A comma-separated list of the reference's words, in any order, each as often as there."""
    return sorted(_words(text)) == sorted(_words(answer))


def same_text(text: str, answer: str) -> bool:
    """Exactly the reference, apart from surrounding white space."""
    return text.strip() == answer.strip()


def latin_square(text: str, answer: str) -> bool:
    """A square of the reference's words, in which no row and no column has one twice."""
    rows, wanted = _rows(text), _rows(answer)
    words = set(wanted[0])
    lines = [*rows, *zip(*rows, strict=True)] if len({len(row) for row in rows}) == 1 else []
    return bool(lines) and len(rows) == len(wanted) and all(sorted(line) == sorted(words) for line in lines)


def one_of_the_pairs(text: str, answer: str) -> bool:
    """One of the pairs that the reference is one of; capitals and a full stop do not count."""
    choices = next((pairs for pairs in PAIRS if _folded(answer) in map(_folded, pairs)), [])
    return _folded(text) in map(_folded, choices)


def same_number(text: str, answer: str) -> bool:
    """The number that the text comes to is the reference's: the flexible reading of GSM8K, see `numbers.stated`."""
    got, wanted = numbers.stated(text), numbers.stated(answer)
    return wanted is not None and got == wanted


def same_marked_number(text: str, answer: str) -> bool:
    """The number behind the first #### of the text is the reference's: the strict reading of GSM8K."""
    got = numbers.marked(text)
    return got is not None and got == numbers.stated(answer)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip().removesuffix(".").split(",")]


def _rows(text: str) -> list[list[str]]:
    return [_words(row) for row in re.split(r"[;\n]", text.strip().removesuffix(".")) if row.strip()] or [[]]


def _folded(text: str) -> str:
    return " ".join(text.strip().removesuffix(".").casefold().split())


class Scorer(Protocol):
    """A task's rule."""

    def __call__(self, text: str, answer: str) -> bool:
        """Whether a generated text is as good as the reference answer."""


SCORERS: dict[str, Scorer] = {
    "word_problem": same_stated_number,
    "copy": same_text,
    "reverse": same_text,
    "sort": same_text,
    "shuffle": same_words,
    "latin_square": latin_square,
    "paired_choice": one_of_the_pairs,
    "gsm8k": same_number,
    "math500": maths.same_value,
}
STRICT: dict[str, Scorer] = {"gsm8k": same_marked_number}  # a second, stricter reading, reported beside the first


class CodeTask(NamedTuple):
    """A task whose answers are run."""

    program: Callable[[str, Mapping[str, Any]], str]  # from the text and the line of the data set
    needs: Mapping[str, type]  # the fields of that line


CODE_TASKS = {
    "humaneval": CodeTask(programs.human_eval, {"prompt": str, "test": str, "entry_point": str}),
    "mbpp": CodeTask(programs.mbpp, {"test_list": list}),
}
TASKS = (*SCORERS, *CODE_TASKS)


def scorer_for(task: Any, answer: Any, *, limits: CodeLimits = LIMITS) -> Callable[[str], bool]:
    """What tells whether a text is right for a sample; made before anything is decoded, to find mistakes early.

    Args:
        task: the sample's task, any value of its line.
        answer: its reference answer, likewise: a text; for humaneval and mbpp the data set's own line, or the fields of
            it that its tests need.
        limits: of programs; that of humaneval and mbpp RUNS the text it is called with, behind these limits. Whoever
            scores what somebody else asks for has `check_allowed` to ask before.

    Raises:
        UsageError: nobody knows how to score the task, or the reference would not pass its own test.
    """
    if not isinstance(task, str) or task not in TASKS:
        raise UsageError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if task in CODE_TASKS:
        return _code_scorer(task, answer, limits)
    if task == "math500":
        cli.require("math_verify", extra="eval")
    if not isinstance(answer, str) or not _is_reference(task, answer):
        raise UsageError(f"answer: expected the text of a {task} answer, got {answer!r}")
    return functools.partial(SCORERS[task], answer=answer)


def strict_scorer_for(task: str, answer: Any) -> Callable[[str], bool] | None:
    """The stricter reading of a sample that `scorer_for` knows; None if its task has one reading."""
    return functools.partial(STRICT[task], answer=answer) if task in STRICT else None


def check_allowed(task: Any, *, run_code: bool) -> None:
    """Refuses a task whose answers are programs, unless they may be run.

    Raises:
        UsageError: naming the setting.
    """
    if isinstance(task, str) and task in CODE_TASKS and not run_code:
        raise UsageError(f"eval.run_code: expected true, as {task} runs the code that the model writes, got false")


def _is_reference(task: str, answer: str) -> bool:
    """Whether a text that says the same as the reference could be right."""
    return bool(answer.strip()) if task == "math500" else SCORERS[task](answer, answer)


def _code_scorer(task: str, answer: Any, limits: CodeLimits) -> Callable[[str], bool]:
    about = CODE_TASKS[task]
    for name, kind in about.needs.items():
        if not isinstance(answer, Mapping) or not isinstance(answer.get(name), kind) or not answer[name]:
            raise UsageError(f"answer: expected the fields {', '.join(about.needs)} of {task}, got no {name}")
    if not all(isinstance(test, str) for test in answer.get("test_list", [])):
        raise UsageError(f"answer: expected test_list to hold text, got {answer['test_list']!r}")
    return lambda text: programs.passes(about.program(text, answer), limits)
