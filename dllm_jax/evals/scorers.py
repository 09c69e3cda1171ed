"""When an answer counts as correct, task by task."""

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol

from dllm_jax.errors import UsageError

_STATED = re.compile(r"answer is (-?\d+)")


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


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip().removesuffix(".").split(",")]


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
}


def scorer_for(task: Any, answer: Any) -> Callable[[str], bool]:
    """What tells whether a text is right for a sample; made before anything is decoded, to find mistakes early.

    Args:
        task: the sample's task, any value of its line.
        answer: its reference answer, likewise.

    Raises:
        UsageError: nobody knows how to score the task, or the reference would not pass its own test.
    """
    if not isinstance(task, str) or task not in SCORERS:
        raise UsageError(f"task: expected one of {', '.join(SCORERS)}, got {task!r}")
    if not isinstance(answer, str) or not SCORERS[task](answer, answer):
        raise UsageError(f"answer: expected the text of a {task} answer, got {answer!r}")
    return functools.partial(SCORERS[task], answer=answer)
