"""When an answer counts as correct, task by task."""

import re
from collections.abc import Callable

from dllm_jax.errors import UsageError

Scorer = Callable[[str, str], bool]  # (generated text, reference answer) -> correct
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


SCORERS: dict[str, Scorer] = {
    "word_problem": same_stated_number,
    "copy": same_text,
    "reverse": same_text,
    "sort": same_text,
    "shuffle": same_words,
}


def find_scorer(task: str | None, answer: str | None) -> Scorer:
    """The scorer of a sample, checked before anything is decoded.

    Args:
        task: the sample's task.
        answer: its reference answer.

    Raises:
        UsageError: nobody knows how to score the task, or the reference would not pass its own test.
    """
    if task not in SCORERS:
        raise UsageError(f"task: expected one of {', '.join(SCORERS)}, got {task!r}")
    if answer is None or not SCORERS[task](answer, answer):
        raise UsageError(f"answer: expected the text of a {task} answer, got {answer!r}")
    return SCORERS[task]
