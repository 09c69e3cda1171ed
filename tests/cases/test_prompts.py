"""Prompt files as people have them: read where they are unambiguous, else refused in one line with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dllm_jax.data.prompts import BadLines, Prompt, read
from dllm_jax.errors import UsageError
from dllm_jax.settings import InputSettings
from tests.cases.conftest import JSONL, Run

LIST = "Sort the list: oak, fern, duck."
CONVERSATION = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
USER = {"role": "user", "content": "q"}
READ = {
    "bom_crlf.jsonl": [(0, LIST), (1, LIST)],
    "u2028.jsonl": [(1, "Sort the list:\u2028oak, fern."), (2, "emoji \U0001f600 \u0301")],
    "idobj.jsonl": [({"a": [1, None]}, LIST), (None, LIST)],
    "content_list.jsonl": [(0, ({"role": "user", "content": LIST},))],
    "sharegpt.jsonl": [("x", ({"role": "user", "content": LIST},))],
    "alpaca.jsonl": [(0, "Sort the list.\noak, fern")],
    "humaneval.jsonl": [("HumanEval/0", "def f(x):\n")],
    "mbpp.jsonl": [(601, "Write a function to add.")],
    "gsm8k.jsonl": [(0, "Anna has 18 cards. After that Anna gives away 11. How many cards does Anna have now?")],
    "lmeval.jsonl": [(0, "Question: 2+2?\nAnswer:")],
    "gz.jsonl.gz": [(0, LIST)],
    "ends_assistant.jsonl": [
        (0, ({"role": "user", "content": LIST}, {"role": "assistant", "content": "Sure: "})),
    ],
    "answer_int.jsonl": [(1, LIST), (2, LIST)],
    "task_dict.jsonl": [(1, LIST)],
    "nul.jsonl": [(0, "Sort\0 the list: oak, fern.")],
}
REFUSED = {
    "array.json": "expected a JSON object, got invalid JSON",
    "array1line.json": 'expected a JSON object, got [{"prompt"',
    "text.txt": "expected a JSON object, got invalid JSON",
    "utf16.jsonl": "expected UTF-8 text",
    "latin1.jsonl": "expected UTF-8 text",
    "cr_only.jsonl": "invalid JSON (Extra data",
    "trailing_comma.jsonl": "invalid JSON (Extra data",
    "nan.jsonl": "NaN is no JSON value",
    "dupkey.jsonl": "'prompt' comes twice",
    "bigint.jsonl": "an integer of 5000 digits",
    "promptids_float.jsonl": "prompt_ids: expected integers from 0, got 1.0",
    "content_null.jsonl": "messages: tool_calls: expected none",
    "nullmsgs.jsonl": "got prompt and messages",
    "both.jsonl": "got prompt and messages",
    "list_prompt.jsonl": "prompt: expected a string",
    "promptlist_chat.jsonl": "prompt: expected a string",
    "blank_prompt.jsonl": "prompt: expected a string that is not empty or blank",
}


def read_file(path: Path) -> list[Prompt]:
    return list(read(InputSettings(path=str(path)), BadLines(str(path), "fail")))


def read_line(folder: Path, record: dict[str, Any] | str) -> Prompt:
    path = folder / "in.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return read_file(path)[0]


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read(name: str) -> None:
    assert [(prompt.id, prompt.text or prompt.messages) for prompt in read_file(JSONL / name)] == READ[name]


def test_all_of_them_decode(tmp_path: Path, run: Run) -> None:
    contents = [(JSONL / name).read_bytes() for name in READ]
    lines = [gzip.decompress(c) if c.startswith(b"\x1f\x8b") else c for c in contents]
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(b"\n\n".join(lines)))
    ran = run(f"input.path={tmp_path}/all.jsonl.gz", "decode.gen_length=8", "decode.block_length=8", config="threshold")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert len(rows) == sum(map(len, READ.values()))
    assert [rows[i]["id"] for i in (0, 6, 7)] == [0, 6, "x"]
    assert rows[0]["output_ids"] == rows[6]["output_ids"] == rows[7]["output_ids"]  # the same question


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused(run: Run, name: str) -> None:
    error = run(f"input.path={JSONL / name}").error
    assert error.startswith(f"error: {JSONL / name}:1: ")
    assert REFUSED[name] in error


@pytest.mark.parametrize("name", ["empty.jsonl", "blank_only.jsonl"])
def test_no_lines_are_refused(run: Run, name: str) -> None:
    assert "input.path: expected at least one line of JSON" in run(f"input.path={JSONL / name}").error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("promptids_big.jsonl", ":1: prompt: expected token ids from 0 to 511, got 99999"),
        ("promptids_huge.jsonl", ":1: prompt: expected token ids from 0 to 511, got 1180591620717411303424"),
        ("long.jsonl", ":1: prompt: expected at most 128 tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused(run: Run, name: str, message: str) -> None:
    ran = run(f"input.path={JSONL / name}", "decode.gen_length=1024", "decode.block_length=8")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith(f"error: {JSONL / name}{message}")


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"problem": "2+2?", "solution": "4", "level": "Level 1", "unique_id": "test/1"}, "2+2?"),
        ({"task_id": 2, "prompt": "Add.", "code": "def", "test_list": ["assert"]}, "Add."),  # MBPP, sanitized
        ({"instruction": "Sort.", "input": "", "output": "x"}, "Sort."),
        ({"question": "a", "prompt": "Q: a"}, "Q: a"),
        ({"doc_id": 3, "arguments": [["2+2?", {"until": []}]]}, "2+2?"),
        ({"prompt": "q", "tools": None, "images": [], "stop": "", "model": "m", "temp": 1}, "q"),
        ({"prompt": "q", "system": ""}, "q"),
        ({"messages": [{"role": "system", "content": ""}, USER]}, ({"role": "system", "content": ""}, USER)),
        ({"prompt": "q", "system": "s"}, ({"role": "system", "content": "s"}, USER)),
        ({"messages": [USER], "system_prompt": "s"}, ({"role": "system", "content": "s"}, USER)),
        ({"conversations": CONVERSATION, "system": "s"}, ({"role": "system", "content": "s"}, USER)),
        ({"conversations": [*CONVERSATION, CONVERSATION[0]]}, (USER, {"role": "assistant", "content": "a"}, USER)),
        ({"conversations": [USER]}, (USER,)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            ({"role": "user", "content": "a\nb"},),
        ),
    ],
)
def test_neighbours_that_are_read(tmp_path: Path, record: dict[str, Any], asked: Any) -> None:
    prompt = read_line(tmp_path, record)
    assert (prompt.text or prompt.messages) == asked


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "temperature": 0}, "temperature: expected none, .*decode.temperature is for all lines"),
        ({"prompt": "q", "tools": [{"type": "function"}]}, "tools: expected none, as it would change the answer"),
        ({"messages": [USER], "functions": [{}]}, "functions: expected none"),
        ({"prompt": "q", "stop": ["\n"]}, "stop: expected none"),
        ({"prompt": "q", "max_tokens": 10}, "max_tokens: expected none"),
        ({"prompt": "q", "top_p": 0.9}, "top_p: expected none"),
        ({"prompt": "q", "seed": 0}, "seed: expected none"),
        ({"prompt": "q", "images": ["a.png"]}, "images: expected none"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages: tool_calls: expected none"),
        ({"question": "q", "choices": ["a", "b"]}, "choices: expected none"),
        ({"question": "q", "context": "c"}, "context: expected none"),
        ({"instruction": "i", "input": ["a"]}, "input: expected a string"),
        ({"prompt": "q", "instruction": "i"}, "got prompt and instruction"),
        ({"question": "q", "instruction": "i"}, "got question and instruction"),
        ({"id": 1, "text": "an answer", "output_ids": [1]}, "got none"),
        ({"arguments": {"x": 1}}, "got none"),
        ({"doc_id": 0, "arguments": [["c", " a"], ["c", " b"]]}, "arguments: expected one request"),
        ({"doc_id": 0, "arguments": [["c", " a"]]}, "arguments: expected a prompt and the settings"),
        ({"doc_id": 0, "arguments": {}}, "arguments: expected one request"),
        ({"prompt_ids": [1], "system": "s"}, "system: expected none beside prompt_ids"),
        ({"prompt": "q", "system": 3}, "system: expected a string"),
        ({"prompt": "q", "system": "a", "system_prompt": "b"}, "system_prompt: expected none beside system"),
        ({"messages": [{"role": "system", "content": "s"}, USER], "system": "s"}, "none beside a system message"),
        ({"messages": [{"role": "system", "content": "s"}]}, "expected a last message of user or assistant"),
        ({"messages": [{"role": "tool", "content": "42"}]}, 'expected role to be one of .*, got "tool"'),
        ({"messages": [{"role": "user", "content": " "}]}, "expected text in a message to be answered"),
        ({"messages": [{"role": "user", "content": []}]}, "expected text in a message to be answered"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of the type text"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "parts of the type text"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations: expected a turn of human"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "expected from to be one of human, gpt"),
        ('{"prompt": "q", "id": 1e999}', "1e999 is no finite number"),
        ('{"prompt": "q", "meta": {"a": 1, "a": 2}}', "'a' comes twice"),
    ],
)
def test_neighbours_that_are_refused(tmp_path: Path, record: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"in\.jsonl:1: .*{message}"):
        read_line(tmp_path, record)


@pytest.mark.parametrize("cut", [5, -5])
def test_half_a_gzip_file_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "in.jsonl").write_bytes((JSONL / "gz.jsonl.gz").read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"input\.path: expected a whole gzip file"):
        read_file(tmp_path / "in.jsonl")


@pytest.mark.parametrize("name", ["answer_int.jsonl", "task_dict.jsonl"])
def test_scoring_needs_the_answers_that_decoding_ignores(run: Run, name: str) -> None:
    assert f"{name}:1: task: expected one of " in run(f"input.path={JSONL / name}", command="eval").error


def test_scoring_needs_a_string(tmp_path: Path, run: Run) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": LIST, "task": "sort", "answer": 7}))
    error = run(f"input.path={tmp_path}/in.jsonl", command="eval").error
    assert "in.jsonl:1: answer: expected the text of a sort answer, got 7" in error
