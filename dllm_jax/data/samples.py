"""Prompts with answers, to learn from and to measure on: read or drawn, and encoded."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dllm_jax.data import formats, prompts, tasks
from dllm_jax.data.lines import open_lines
from dllm_jax.data.packing import Example
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings

T = TypeVar("T")
BUILT_IN = "built-in tasks"


class OwnAnswer(NamedTuple):
    """An answer that a model gave itself."""

    tokens: Sequence[int]  # with whatever ends them
    order: Sequence[int]  # forward in which each was committed; 0: unknown


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


def read_texts(
    path: str | Path, bad: BadLines, codec: TextCodec, *, field: str, end_id: int, length: int
) -> list[Example]:
    """The bare texts of a JSONL file, `{"text": ...}`: examples without a prompt, all of which is learnt.

    A text, with the token that ends it, is cut into pieces of `length` tokens and what is left. Other fields are
    metadata, but for those that would make the line a prompt.

    Args:
        path: the file.
        bad: what happens with malformed lines.
        codec: the tokenizer.
        field: the setting the path came from, for errors.
        end_id: what ends a text.
        length: the most tokens of an example.

    Raises:
        UsageError: the file cannot be read or has no good line, or `bad` fails at a line.
    """
    examples: list[Example] = []
    for _, number, line in open_lines(str(path), field=field).scan():
        with bad.line(number, text=functools.partial(bytes, line)):
            record = prompts.record(line)
            if asked := [name for name in formats.OWN if name in record]:
                raise UsageError(f"text: expected none of {', '.join(formats.OWN)} beside it, got {', '.join(asked)}")
            text = formats.checked_text(record.get("text"), "text")
            tokens = np.array([*codec.encode_answer(text), end_id], np.int32)
            examples.extend(Example(tokens[start : start + length], 0) for start in range(0, len(tokens), length))
    bad.report(good=len(examples))
    return examples


def _split(prompt: Prompt) -> Prompt:
    """Takes a last message by the assistant as the answer."""
    if prompt.answer is not None or not prompt.messages or prompt.messages[-1]["role"] != "assistant":
        return prompt
    return dataclasses.replace(prompt, messages=prompt.messages[:-1], answer=prompt.messages[-1]["content"])


def built_in(
    count: int, *, seed: int, shares: Mapping[str, float] = tasks.EQUAL_SHARES, longer: float = 0.0
) -> list[Prompt]:
    """Draws of the built-in tasks, none of them held out.

    Equal parts suit a short training: the answers of the list tasks are short, and in their shares of the bundled
    models' data (`tasks.TRAINING_SHARES`) they would have a thirtieth of the tokens each.

    Args:
        count: how many in all.
        seed: of the draws.
        shares: part of each task; they add up to 1.
        longer: part of every task that is drawn longer, `tasks.LONG`.
    """
    held_out = tasks.held_out_prompts()
    drawn: list[dict[str, str]] = []
    for task, part in _parts(count, shares).items():
        long = round(part * longer)
        for extent, number in ((tasks.SHORT, part - long), (tasks.LONG, long)):
            drawn.extend(tasks.generate(task, number, seed=seed, exclude=held_out, extent=extent))
    return [
        Prompt(
            index=i, line=i + 1, id=sample["id"], text=sample["prompt"], task=sample["task"], answer=sample["answer"]
        )
        for i, sample in enumerate(drawn)
    ]


def _parts(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`count` in whole parts: rounded down, and one more for those that lose most by it, of equals the last."""
    parts = {name: int(count * share) for name, share in shares.items()}
    lost = sorted(enumerate(shares), key=lambda each: (count * shares[each[1]] - parts[each[1]], each[0]))
    for _, name in lost[len(lost) - (count - sum(parts.values())) :]:
        parts[name] += 1
    return parts


def encode(prompt: Prompt, codec: TextCodec, *, answer: OwnAnswer | None, end_id: int, length: int) -> Sample:
    """The tokens of a sample.

    Args:
        prompt: with an answer, unless `answer` is given.
        codec: the tokenizer.
        answer: what to learn instead of the answer that came with the prompt.
        end_id: what ends the answer that came with the prompt.
        length: the most tokens there may be.

    Raises:
        UsageError: there are more, or the chat template refuses the messages.
    """
    question = codec.encode(prompt)
    tokens = answer.tokens if answer else [*codec.encode_answer(prompt.answer or ""), end_id]
    total = len(question) + len(tokens)
    if total > length:
        raise UsageError(f"prompt and answer: expected at most {length} tokens (data.length), got {total}")
    order = np.array([*[0] * len(question), *answer.order], np.int32) if answer else None
    return Sample(prompt, Example(np.array([*question, *tokens], np.int32), len(question), order))


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
