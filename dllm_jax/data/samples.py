"""Prompts with answers, to learn from and to measure on: read or drawn, and encoded."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from dllm_jax.data import formats, prompts, tasks
from dllm_jax.data.packing import Example
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings

T = TypeVar("T")
BUILT_IN = "built-in tasks"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what is learnt or measured of it."""

    prompt: Prompt
    example: Example


def read(path: str | Path, bad: BadLines, *, field: str, answers: bool) -> list[Prompt]:
    """The samples of a JSONL file: prompt or messages with an answer, or messages that end with the assistant's.

    Args:
        path: the file.
        bad: what happens with malformed lines.
        field: the setting the path came from, for errors.
        answers: a line without an answer is malformed.

    Raises:
        UsageError: see `prompts.read`.
    """

    def check(prompt: Prompt) -> None:
        for name in ("task", "answer"):
            if not isinstance(value := getattr(prompt, name), str | None):
                raise UsageError(f"{name}: expected a string, got {formats.shorten(value)}")
        if answers and not _split(prompt).answer:
            raise UsageError(f"answer: expected a string that is not empty, got {_split(prompt).answer!r}")
        if _split(prompt).messages == ():
            raise UsageError("messages: expected a question before the answer, got none")

    return [_split(prompt) for prompt in prompts.read(InputSettings(path=str(path)), bad, check=check, field=field)]


def _split(prompt: Prompt) -> Prompt:
    """Takes a last message by the assistant as the answer."""
    if prompt.answer is not None or not prompt.messages or prompt.messages[-1]["role"] != "assistant":
        return prompt
    return dataclasses.replace(prompt, messages=prompt.messages[:-1], answer=prompt.messages[-1]["content"])


def built_in(count: int, *, seed: int) -> list[Prompt]:
    """Draws of the built-in tasks, about as many of each, none of them held out.

    Equal parts suit a short training: the answers of the list tasks are short, and in their shares of the bundled
    models' data (`tasks.TRAINING_SHARES`) they would have a thirtieth of the tokens each.
    """
    held_out = tasks.held_out_prompts()
    drawn = [
        sample
        for i, task in enumerate(tasks.TASKS)
        for sample in tasks.generate(task, (count + i) // len(tasks.TASKS), seed=seed, exclude=held_out)
    ]
    return [
        Prompt(
            index=i, line=i + 1, id=sample["id"], text=sample["prompt"], task=sample["task"], answer=sample["answer"]
        )
        for i, sample in enumerate(drawn)
    ]


def encode(prompt: Prompt, codec: TextCodec, *, answer: Sequence[int] | None, end_id: int, length: int) -> Sample:
    """The tokens of a sample.

    Args:
        prompt: with an answer, unless `answer` is given.
        codec: the tokenizer.
        answer: the tokens to learn instead of the prompt's own answer, with whatever ends them.
        end_id: what ends the prompt's own answer.
        length: the most tokens there may be.

    Raises:
        UsageError: there are more, or the chat template refuses the messages.
    """
    question = codec.encode(prompt)
    if answer is None:
        answer = [*codec.encode_answer(prompt.answer or ""), end_id]
    total = len(question) + len(answer)
    if total > length:
        raise UsageError(f"prompt and answer: expected at most {length} tokens (data.length), got {total}")
    return Sample(prompt, Example(np.array([*question, *answer], np.int32), len(question)))


def without(samples: Iterable[Sample], held_out: Iterable[Sample]) -> list[Sample]:
    """The samples whose prompts are not among the held-out ones."""

    def question(sample: Sample) -> bytes:
        return sample.example.tokens[: sample.example.prompt_length].tobytes()

    reserved = {question(sample) for sample in held_out}
    return [sample for sample in samples if question(sample) not in reserved]


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at even distances, or all of them if there are not so many."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
