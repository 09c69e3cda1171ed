"""Samples to learn from: drawn, read from chats, encoded, and kept apart from the held-out ones."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import samples, tasks, text
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.settings import TokenizerSettings

EOT = 5


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    loaded = text.load(ASSETS / "llada-tiny", TokenizerSettings())
    assert loaded
    return loaded


def encoded(codec: TextCodec, question: str, answer: str = "oak.") -> Sample:
    prompt = Prompt(index=0, line=1, id=0, text=question, answer=answer)
    return samples.encode(prompt, codec, answer=None, end_id=EOT, length=100)


def test_built_in_samples_are_balanced_and_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = samples.built_in(203, seed=0)
    assert Counter(prompt.task for prompt in drawn) == dict(zip(tasks.TASKS, (40, 40, 41, 41, 41), strict=True))
    assert len({prompt.id for prompt in drawn}) == 203
    assert drawn == samples.built_in(203, seed=0)
    reserved = {prompt.text for prompt in drawn[::2]}
    monkeypatch.setattr(tasks, "held_out_prompts", lambda: frozenset(reserved))
    assert not reserved & {prompt.text for prompt in samples.built_in(203, seed=0)}


def test_an_answer_is_a_field_or_the_last_message(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lines = [{"prompt": "q", "answer": "a"}, {"messages": [user, assistant]}, {"messages": [user], "answer": "a"}]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    read = samples.read(path, BadLines(str(path), "fail"), field="data.path", answers=True)
    assert [prompt.answer for prompt in read] == ["a", "a", "a"]
    assert [prompt.messages for prompt in read] == [None, (user,), (user,)]


def test_a_sample_is_the_prompt_as_it_is_decoded_and_the_answer_with_its_end(codec: TextCodec) -> None:
    example = encoded(codec, "Copy the list: oak.").example
    prompt = Prompt(index=0, line=1, id=0, text="Copy the list: oak.")
    assert example.tokens[: example.prompt_length].tolist() == codec.encode(prompt)
    assert codec.decode(example.answer) == "oak."
    assert example.answer[-1] == EOT
    own = samples.encode(prompt, codec, answer=[7, 8, 0], end_id=EOT, length=100).example
    assert own.answer.tolist() == [7, 8, 0]


def test_a_sample_may_be_exactly_as_long_as_a_row(codec: TextCodec) -> None:
    prompt = Prompt(index=0, line=1, id=0, text="q", answer="a")
    total = len(encoded(codec, "q", "a").example.tokens)
    samples.encode(prompt, codec, answer=None, end_id=EOT, length=total)
    with pytest.raises(UsageError, match=f"expected at most {total - 1} tokens"):
        samples.encode(prompt, codec, answer=None, end_id=EOT, length=total - 1)


def test_held_out_prompts_are_not_learnt_whatever_their_answer(codec: TextCodec) -> None:
    learnt = [encoded(codec, question, answer) for question in ("q", "r") for answer in ("a", "b")]
    kept = samples.without(learnt, [encoded(codec, "q", "c")])
    assert kept == learnt[2:]


def test_spread_takes_items_at_even_distances() -> None:
    assert samples.spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert samples.spread("abc", 9) == ["a", "b", "c"]
