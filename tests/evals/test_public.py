"""Lines of public data sets: which task they are of, and how they are asked."""

import json

import pytest

from dllm_jax.data.prompts import BadLines, read
from dllm_jax.errors import UsageError
from dllm_jax.evals import public
from dllm_jax.evals.scorers import scorer_for
from dllm_jax.settings import InputSettings

# Made up, in the formats of the data sets.
GSM8K = {"question": "Anna has 18 cards and gives away 11. How many are left?", "answer": "18-11=<<18-11=7>>7\n#### 7"}
MATH500 = {
    "problem": "What is $1 + \\frac{1}{2}$?",
    "solution": "It is $\\boxed{\\frac{3}{2}}$.",
    "answer": "\\frac{3}{2}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
MATH = {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": '\ndef f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {
    "task_id": 601,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x.ipynb",
    "task_id": 2,
    "prompt": "Write a function to add.",
    "code": MBPP["code"],
    "test_imports": [],
    "test_list": MBPP["test_list"],
}
LINES = {"gsm8k": GSM8K, "math500": MATH500, "humaneval": HUMANEVAL, "mbpp": MBPP}


def prompts(tmp_path, *lines):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(InputSettings(path=str(path)), BadLines(str(path), "fail"))


def ask(tmp_path, line, *, task="", chat=False, shots=0):
    return public.asked(*prompts(tmp_path, line), task=task, chat=chat, shots=shots)


@pytest.mark.parametrize(
    ("line", "task", "right", "wrong"),
    [
        (GSM8K, "gsm8k", "7", "8"),
        (MATH500, "math500", r"\boxed{1.5}", r"\boxed{1}"),
        (MATH, "math500", r"\boxed{2}", r"\boxed{1}"),
        ({"problem": "What is 1+1?", "answer": 2}, "math500", r"\boxed{2}", r"\boxed{1}"),
        (HUMANEVAL, "humaneval", "    return 2 * x", "    return x"),
        (MBPP, "mbpp", MBPP["code"], "pass"),
        (SANITIZED, "mbpp", MBPP["code"], "pass"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_lines_are_told_by_their_fields_and_asked_without_their_answers(tmp_path, line, task, right, wrong, chat):
    asked = ask(tmp_path, line, chat=chat)
    assert asked.task == task
    score = scorer_for(asked.task, asked.answer)
    assert (score(right), score(wrong)) == (True, False)
    assert (asked.text is None, asked.messages is None) == (chat, not chat)
    shown = asked.messages[0]["content"] if chat else asked.text
    assert (line.get("question") or line.get("problem") or line.get("text") or line["prompt"]).strip() in shown
    for secret in ("answer", "solution", "canonical_solution", "code", "test"):
        assert str(line.get(secret, "nowhere")) not in shown
    assert asked.stop == public.wording(task, chat=chat).stop
    assert bool(asked.stop) is not chat


def test_wordings(tmp_path):
    assert ask(tmp_path, GSM8K).text == f"Question: {GSM8K['question']}\nAnswer:"
    assert ask(tmp_path, HUMANEVAL).text == HUMANEVAL["prompt"]
    tests = "\n".join(MBPP["test_list"])
    assert f"pass these tests:\n\n{tests}\n[BEGIN]\n" in ask(tmp_path, MBPP).text
    assert r"put the final answer in \boxed{}." in ask(tmp_path, MATH500, chat=True).messages[0]["content"]
    assert ask(tmp_path, HUMANEVAL, chat=True).messages[0]["content"].count("```") == 2


@pytest.mark.parametrize(("task", "shots"), [("gsm8k", 5), ("math500", 4), ("humaneval", 0), ("mbpp", 3)])
def test_examples_stand_in_front(tmp_path, task, shots):
    plain, chat = (ask(tmp_path, LINES[task], chat=chat, shots=-1) for chat in (False, True))
    words = public.wording(task, chat=True)
    assert len(chat.messages) == 2 * shots + 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * shots + ["user"]
    assert plain.text.endswith(ask(tmp_path, LINES[task]).text)
    assert plain.text.count("\n\n") >= shots
    assert len(words.examples) == shots
    for example, turn in zip(words.examples, chat.messages[1::2], strict=False):
        assert scorer_for(task, public.reference_of(task, example))(turn["content"])  # examples are right
        assert not any(stop in public.wording(task, chat=False).answered(example)[:-6] for stop in plain.stop)
    assert len(ask(tmp_path, LINES[task], chat=True, shots=shots).messages) == 2 * shots + 1
    with pytest.raises(UsageError, match=f"eval.shots: expected at most {shots} for {task}, got {shots + 1}"):
        ask(tmp_path, LINES[task], shots=shots + 1)


def test_what_a_line_says_of_itself_comes_first(tmp_path):
    bare = {"question": "2 + 3?", "answer": "5"}
    assert ask(tmp_path, bare).task is None
    assert ask(tmp_path, bare, task="gsm8k").text == "Question: 2 + 3?\nAnswer:"
    assert ask(tmp_path, GSM8K, task="math500").task == "math500"  # a setting before what fields tell
    assert ask(tmp_path, GSM8K | {"task": "copy"}, task="gsm8k").task == "copy"
    own = ask(tmp_path, {"prompt": "2 + 3?", "answer": "5"}, task="gsm8k", shots=3)
    assert (own.text, own.task, own.answer, own.stop) == ("2 + 3?", "gsm8k", "5", ())


def test_a_system_message_stays_in_front(tmp_path):
    asked = ask(tmp_path, GSM8K | {"system": "Be short."}, chat=True, shots=1)
    assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "user"]
    assert asked.messages[0]["content"] == "Be short."


def test_other_lines_are_no_data_sets(tmp_path):
    lines = [{"prompt": "x", "question": "y"}, {"instruction": "x"}, {"prompt_ids": [1]}]
    assert [prompt.doc for prompt in prompts(tmp_path, *lines)] == [None] * 3
