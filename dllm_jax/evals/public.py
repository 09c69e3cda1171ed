"""Public data sets as tasks: which one a line is of, and how it is asked.

The wordings, with their examples and stop strings, are the files of `assets/eval/`: `plain` for a model that goes on
with a text, `chat` for one that answers messages. An example is asked in the same words as the question behind it.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_jax.data.prompts import Prompt
from dllm_jax.errors import UsageError
from dllm_jax.evals.numbers import boxed

FOLDER = Path(__file__).parents[1] / "assets" / "eval"
TASKS = ("gsm8k", "math500", "humaneval", "mbpp")
BETWEEN = "\n\n"  # examples of a plain prompt
Doc = Mapping[str, Any]  # a line of a data set


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a task is asked."""

    question: str  # of a line and of an example
    answer: str  # of an example
    shots: int  # examples that are usual
    stop: tuple[str, ...]
    examples: tuple[Doc, ...]

    def asked(self, doc: Doc) -> str:
        """The question of a line or an example."""
        return self.question.format_map(_fields(doc))

    def answered(self, doc: Doc) -> str:
        """The answer of an example."""
        return self.answer.format_map(_fields(doc))

    def chosen(self, shots: int, task: str) -> tuple[Doc, ...]:
        """The examples that come first.

        Args:
            shots: how many; -1: as usual.
            task: for the error.

        Raises:
            UsageError: there are not so many.
        """
        if shots > len(self.examples):
            raise UsageError(f"eval.shots: expected at most {len(self.examples)} for {task}, got {shots}")
        return self.examples[: self.shots if shots < 0 else shots]


@functools.cache
def wording(task: str, *, chat: bool) -> Wording:
    """The wording of one of `TASKS`."""
    about = json.loads((FOLDER / f"{task}.json").read_text(encoding="utf-8"))
    kind = about["chat" if chat else "plain"]
    return Wording(**kind | {"stop": tuple(kind["stop"]), "examples": tuple(about["examples"])})


def task_of(doc: Doc) -> str:
    """Which one of `TASKS` a line is of, "" if that cannot be told from its fields."""
    if {"prompt", "test", "entry_point"} <= set(doc):
        return "humaneval"
    if "test_list" in doc:
        return "mbpp"
    if "problem" in doc and reference_of("math500", doc):
        return "math500"
    return "gsm8k" if "question" in doc and "#### " in str(doc.get("answer")) else ""


def reference_of(task: str, doc: Doc) -> Any:
    r"""What `scorers.scorer_for` wants of a line: the answer in words, or for programs the line itself.

    The answer of MATH is `answer`, else the last \boxed{} of `solution`.
    """
    if task not in ("gsm8k", "math500"):
        return doc
    answer, solution = doc.get("answer"), doc.get("solution")
    if type(answer) in (int, float):
        return str(answer)
    return boxed(solution) if task == "math500" and not answer and isinstance(solution, str) else answer


def asked(prompt: Prompt, *, task: str, chat: bool, shots: int) -> Prompt:
    """A line of a data set as it is put to the model; any other prompt stays what it is.

    Args:
        prompt: as it was read.
        task: that of lines which do not name theirs ("": what their fields tell).
        chat: the model answers messages.
        shots: examples in front (-1: as usual).

    Raises:
        UsageError: there are not so many examples.
    """
    doc = prompt.doc
    named = prompt.task if prompt.task is not None else task or (task_of(doc) if doc else "") or None
    if doc is None or not isinstance(named, str) or named not in TASKS:
        return dataclasses.replace(prompt, task=named)
    words = wording(named, chat=chat)
    examples = words.chosen(shots, named)
    system = [message for message in prompt.messages or () if message["role"] == "system"]
    question = words.asked(doc)
    common = {"task": named, "answer": reference_of(named, doc), "stop": words.stop}
    if not chat and not system:
        parts = [words.asked(example) + words.answered(example) for example in examples]
        return dataclasses.replace(prompt, text=BETWEEN.join([*parts, question]), messages=None, **common)
    turns = [(words.asked(example), words.answered(example)) for example in examples]
    messages = [*system, *(_turn(*pair) for turn in turns for pair in zip(("user", "assistant"), turn, strict=True))]
    return dataclasses.replace(prompt, text=None, messages=(*messages, _turn("user", question)), **common)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _fields(doc: Doc) -> dict[str, Any]:
    """The fields of a line under the names of the wordings."""
    names = ("question", "problem", "text", "prompt")  # MBPP has `prompt` where it is sanitized
    question = next(doc[name] for name in names if name in doc)
    return {**doc, "question": question.strip("\n"), "tests": "\n".join(map(str, doc.get("test_list", ())))}
