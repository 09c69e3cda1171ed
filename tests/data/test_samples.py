"""Samples to learn from: drawn, read from chats, encoded, and kept apart from the held-out ones."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import samples, tasks, text
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.samples import OwnAnswer, Sample
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


def test_built_in_samples_in_the_shares_asked_for_and_longer_ones_among_them() -> None:
    drawn = samples.built_in(1000, seed=0, shares=tasks.TRAINING_SHARES, longer=0.25)
    assert len({prompt.id for prompt in drawn}) == 1000
    assert Counter(prompt.task for prompt in drawn) == {"word_problem": 650} | dict.fromkeys(tasks.TASKS[1:], 87) | {
        "sort": 88,
        "shuffle": 88,
    }
    longer = [prompt for prompt in drawn if "-long-" in prompt.id]
    assert Counter(prompt.task for prompt in longer) == {"word_problem": 162} | dict.fromkeys(tasks.TASKS[1:], 22)
    for prompt in drawn:
        if prompt.task != "word_problem":
            assert (str(prompt.text).count(",") >= 9) == (prompt in longer)


def test_parts_are_whole_and_add_up() -> None:
    for count in range(100):
        equal = samples._parts(count, tasks.EQUAL_SHARES)
        assert list(equal.values()) == [(count + i) // 5 for i in range(5)]
        assert sum(samples._parts(count, tasks.TRAINING_SHARES).values()) == count


def test_held_out_samples_fit_a_canvas_of_640(codec: TextCodec) -> None:
    for sample in tasks.read(tasks.HELD_OUT_LONG):
        prompt = Prompt(index=0, line=1, id=0, text=sample["prompt"], answer=sample["answer"])
        samples.encode(prompt, codec, answer=None, end_id=EOT, length=640)


def test_an_answer_is_a_field_or_the_last_message(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lines = [{"prompt": "q", "answer": "a"}, {"messages": [user, assistant]}, {"messages": [user], "answer": "a"}]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    read = samples.read(path, BadLines(str(path), "fail"), field="data.path", answers=True)
    assert [prompt.answer for prompt in read] == ["a", "a", "a"]
    assert [prompt.messages for prompt in read] == [None, (user,), (user,)]


def test_of_several_turns_the_last_is_learnt_and_the_others_ask(tmp_path: Path, codec: TextCodec) -> None:
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    chat = [{"role": role, "content": content} for role, content in turns]
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": content} for r, content in turns]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"messages": chat}, {"conversations": sharegpt}))))
    read = samples.read(path, BadLines(str(path), "fail"), field="data.path", answers=True)
    assert [(prompt.messages, prompt.answer) for prompt in read] == [(tuple(chat[:-1]), "b")] * 2
    example = samples.encode(read[0], codec, answer=None, end_id=EOT, length=100).example
    question = codec.tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert codec.tokenizer.decode(example.tokens[: example.prompt_length]) == question
    assert codec.tokenizer.decode(example.answer) == "b<|eot_id|>"


def test_messages_that_end_with_the_user_have_nothing_to_learn(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]}))
    with pytest.raises(UsageError, match="answer: expected a string that is not empty, got None"):
        samples.read(path, BadLines(str(path), "fail"), field="data.path", answers=True)


def test_bare_texts_are_cut_into_pieces(tmp_path: Path, codec: TextCodec) -> None:
    texts = ["The moon.", "red " * 20]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "url": "u"}) for text in texts))
    read = samples.read_texts(path, BadLines(str(path), "fail"), codec, field="data.path", end_id=EOT, length=12)
    assert {example.prompt_length for example in read} == {0}
    whole = [[*codec.encode_answer(text), EOT] for text in texts]
    assert len(whole[0]) <= 12 < len(whole[1])
    assert read[0].tokens.tolist() == whole[0]
    assert [token for example in read[1:] for token in example.tokens.tolist()] == whole[1]
    assert [len(example.tokens) for example in read[1:-1]] == [12] * (len(read) - 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": " "}, "text: expected a string that is not empty or blank"),
        ({"texts": "a"}, "text: expected a string that is not empty or blank, got null"),
        ({"text": "a", "prompt": "b"}, "text: expected none of prompt, messages, prompt_ids beside it, got prompt"),
    ],
)
def test_lines_that_are_no_bare_texts(tmp_path: Path, codec: TextCodec, line: dict[str, str], message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UsageError, match=f"in.jsonl:1: {message}"):
        samples.read_texts(path, BadLines(str(path), "fail"), codec, field="data.path", end_id=EOT, length=12)


def test_bare_texts_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "The moon."}))
    with pytest.raises(UsageError, match="expected exactly one of prompt, messages, prompt_ids, got none"):
        samples.read(path, BadLines(str(path), "fail"), field="data.path", answers=True)


def test_a_sample_is_the_prompt_as_it_is_decoded_and_the_answer_with_its_end(codec: TextCodec) -> None:
    example = encoded(codec, "Copy the list: oak.").example
    prompt = Prompt(index=0, line=1, id=0, text="Copy the list: oak.")
    assert example.tokens[: example.prompt_length].tolist() == codec.encode(prompt)
    assert codec.decode(example.answer) == "oak."
    assert example.answer[-1] == EOT
    assert example.order is None
    own = samples.encode(prompt, codec, answer=OwnAnswer([7, 8, 0], [2, 1, 2]), end_id=EOT, length=100).example
    assert own.answer.tolist() == [7, 8, 0]
    assert own.order is not None
    assert own.order.tolist() == [0] * own.prompt_length + [2, 1, 2]


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
