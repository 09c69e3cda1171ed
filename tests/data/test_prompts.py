import json
from pathlib import Path

import pytest

from dllm_jax.data.prompts import BadLines, Prompt, read, source
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings


def read_lines(tmp_path: Path, *lines: str | bytes, on_error: str = "fail") -> tuple[list[Prompt], BadLines, str]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    settings = InputSettings(path=str(path), on_error=on_error)
    bad = BadLines(source(settings), on_error)
    return list(read(settings, bad)), bad, str(path)


def test_three_kinds_of_prompts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompts, _, _ = read_lines(
        tmp_path,
        json.dumps({"id": "a", "prompt": "hé 你", "task": "copy", "answer": "x", "more": 1}),
        "",
        json.dumps({"messages": messages}),
        "  ",
        '{"id": null, "prompt_ids": [0, 7]}\r',
    )
    assert prompts == [
        Prompt(index=0, line=1, id="a", text="hé 你", task="copy", answer="x"),
        Prompt(index=1, line=3, id=1, messages=tuple(messages)),
        Prompt(index=2, line=5, id=None, prompt_ids=(0, 7)),
    ]


@pytest.mark.parametrize("value", ["x", 7, 1.5, None, True, [1, "a"], {"k": [None]}])
def test_id_may_be_any_json_value(tmp_path: Path, value: object) -> None:
    prompts, _, _ = read_lines(tmp_path, json.dumps({"id": value, "prompt": "hi"}))
    assert prompts[0].id == value


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    assert read_lines(tmp_path, b'\xef\xbb\xbf{"prompt": "hi"}')[0][0].text == "hi"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "hi"', "expected a JSON object, got invalid JSON"),
        ('{"prompt": "hi", "id": NaN}', "NaN is no JSON value"),
        ("[" * 100_000, "expected a JSON object, got invalid JSON"),
        ('["prompt"]', 'expected a JSON object, got ["prompt"]'),
        (b'{"prompt": "\xff"}', "expected UTF-8 text"),
        ('{"prompt": "\\ud800"}', "expected UTF-8 text"),
        ('{"id": 1}', "expected exactly one of prompt, messages, prompt_ids, got none"),
        ('{"prompt": "a", "prompt_ids": [1]}', "got prompt and prompt_ids"),
        ('{"prompt": ""}', 'prompt: expected a string that is not empty or blank, got ""'),
        ('{"prompt": 3}', "prompt: expected a string that is not empty or blank, got 3"),
        ('{"prompt": null}', "prompt: expected a string that is not empty or blank, got null"),
        ('{"messages": []}', "messages: expected a list that is not empty"),
        ('{"messages": "hi"}', "messages: expected a list that is not empty"),
        ('{"messages": ["hi"]}', 'messages: expected objects, got "hi"'),
        ('{"messages": [{"role": "user"}]}', "messages: expected objects with strings role and content"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "messages: expected objects with strings role and content"),
        ('{"prompt_ids": []}', "prompt_ids: expected a list that is not empty, got []"),
        ('{"prompt_ids": [1, true]}', "prompt_ids: expected integers from 0, got true"),
        ('{"prompt_ids": [1, -1]}', "prompt_ids: expected integers from 0, got -1"),
        ('{"prompt_ids": [1.0]}', "prompt_ids: expected integers from 0, got 1.0"),
        ('{"prompt_ids": ["1"]}', 'prompt_ids: expected integers from 0, got "1"'),
    ],
)
def test_bad_line_names_file_line_and_field(tmp_path: Path, line: str | bytes, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_lines(tmp_path, '{"prompt": "fine"}', "", line)
    assert str(caught.value).startswith(f"{tmp_path / 'in.jsonl'}:3: ")
    assert expected in str(caught.value)


def test_skip_leaves_bad_lines_out_and_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, bad, path = read_lines(tmp_path, "oops", '{"prompt": "a"}', '{"prompt": ""}', on_error="skip")
    bad.report(good=len(prompts))
    assert [(prompt.index, prompt.id, prompt.line) for prompt in prompts] == [(1, 1, 2)]
    assert f"left out 2 bad input line(s); the first: {path}:1: expected a JSON object" in capsys.readouterr().err


def test_skip_of_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected at least one good line, got none"):
        read_lines(tmp_path, "oops", on_error="skip")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"input.path: expected at least one line of JSON, got an empty file"):
        read_lines(tmp_path, content)


@pytest.mark.parametrize("name", ["", "none.jsonl"])
def test_unreadable_file_is_an_error(tmp_path: Path, name: str) -> None:
    settings = InputSettings(path=str(tmp_path / name))
    with pytest.raises(UsageError, match=r"input.path: expected a readable file"):
        read(settings, BadLines(source(settings), "fail"))


def test_one_prompt_and_built_in_prompts() -> None:
    settings = InputSettings(prompt="hi")
    assert read(settings, BadLines(source(settings), "fail")) == [Prompt(index=0, line=1, id=0, text="hi")]
    built_in = read(InputSettings(), BadLines("", "fail"))
    assert {prompt.task for prompt in built_in} == {"word_problem", "copy", "reverse", "sort", "shuffle"}
