import pytest

from dllm_jax.errors import UsageError
from dllm_jax.evals import maths
from dllm_jax.evals.sandbox import CodeLimits
from dllm_jax.evals.scorers import SCORERS, check_allowed, scorer_for, strict_scorer_for

WORD_PROBLEM = "Tom starts with 3 keys. Then Tom buys 2 more, so 3 + 2 = 5. The answer is 5."


@pytest.mark.parametrize(
    ("task", "text", "answer", "correct"),
    [
        ("word_problem", WORD_PROBLEM, WORD_PROBLEM, True),
        ("word_problem", "The answer is 5", WORD_PROBLEM, True),
        ("word_problem", "The answer is 05.", WORD_PROBLEM, True),
        ("word_problem", "The answer is 51.", WORD_PROBLEM, False),
        ("word_problem", "The answer is -5.", WORD_PROBLEM, False),
        ("word_problem", "The answer is 4. No, the answer is 5.", WORD_PROBLEM, True),
        ("word_problem", "3 + 2 = 5.", WORD_PROBLEM, False),
        ("word_problem", "", WORD_PROBLEM, False),
        ("copy", "tea, red, oak.", "tea, red, oak.", True),
        ("copy", " tea, red, oak.\n", "tea, red, oak.", True),
        ("copy", "tea, red, oak", "tea, red, oak.", False),
        ("reverse", "oak, red, tea.", "tea, red, oak.", False),
        ("sort", "oak, red, tea", "oak, red, tea.", False),
        ("shuffle", "red, oak, tea.", "tea, red, oak.", True),
        ("shuffle", "red, oak, tea", "tea, red, oak.", True),
        ("shuffle", "red, oak, oak.", "tea, red, oak.", False),
        ("shuffle", "red, oak, tea, tea.", "tea, red, oak.", False),
        ("shuffle", "red oak, tea.", "tea, red, oak.", False),
        ("shuffle", "", "tea, red, oak.", False),
    ],
)
def test_rules(task, text, answer, correct):
    assert SCORERS[task](text, answer) is correct


def test_a_scorer_knows_its_answer():
    score = scorer_for("copy", "tea.")
    assert score("tea.")
    assert not score("oak.")


@pytest.mark.parametrize("task", ["poetry", None])
def test_an_unknown_task_is_refused(task):
    with pytest.raises(UsageError, match=rf"task: expected one of word_problem, .*, got {task!r}"):
        scorer_for(task, "")


@pytest.mark.parametrize("answer", [None, "5"])
def test_an_answer_no_text_could_match_is_refused(answer):
    with pytest.raises(UsageError, match=rf"answer: expected the text of a word_problem answer, got {answer!r}"):
        scorer_for("word_problem", answer)


SQUARE = "tea, oak, red; red, tea, oak; oak, red, tea."


@pytest.mark.parametrize(
    ("task", "text", "answer", "correct"),
    [
        ("latin_square", SQUARE, SQUARE, True),
        ("latin_square", "red, tea, oak\ntea, oak, red\noak, red, tea\n", SQUARE, True),  # another one
        ("latin_square", "tea, oak, red; red, tea, oak; oak, tea, red.", SQUARE, False),  # tea twice in a column
        ("latin_square", "tea, oak, red; red, tea, tea; oak, red, oak.", SQUARE, False),
        ("latin_square", "tea, oak, red; red, tea, oak.", SQUARE, False),
        ("latin_square", "tea, oak; oak, tea.", SQUARE, False),
        ("latin_square", "tea, oak, red; red, tea; oak, red, tea.", SQUARE, False),
        ("latin_square", "tea, oak, pie; pie, tea, oak; oak, pie, tea.", SQUARE, False),
        ("latin_square", "", SQUARE, False),
        ("paired_choice", "two pair", "High card.", True),
        ("paired_choice", " Two  pair.\n", "high card.", True),
        ("paired_choice", "high pair", "high card.", False),
        ("paired_choice", "high card, two pair", "high card.", False),
        ("paired_choice", "New York", "high card.", False),
        ("paired_choice", "", "high card.", False),
    ],
)
def test_tasks_with_many_right_answers(task, text, answer, correct):
    assert scorer_for(task, answer)(text) is correct


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("She has 16 - 3 - 4 = 9 eggs left.\n#### 9", "9", True),
        ("so it is 9 dozens", "way\n#### 9", True),
        ("#### $1,234.00", "#### 1234", True),
        ("The answer is 1,234 dollars.", "1234", True),
        (r"\boxed{12{,}345}", "12,345", True),
        (r"12\,345 people", "12345", True),
        ("1\u202f234\u202f567 people", "1234567", True),
        ("1,234,56", "1234", False),
        ("7.", "7", True),
        ("7.5 km", "7.5", True),
        ("7.50", "15/2", True),
        (r"It is $\frac{15}{2}$", "7.5", True),
        ("7 1/2 cups", "7.5", True),
        ("7½ cups", "7.5", True),
        ("1/2", "2", False),
        ("1/0", "1", True),  # no fraction
        ("50%", "50", True),
        ("The area is 25 m^2", "25", True),
        (r"\boxed{25 \text{ m}^{2}}", "25", True),
        ("-5", "-5", True),
        ("\u22125 degrees", "-5", True),
        ("#### \u2212 5", "-5", True),
        ("-$5", "-5", True),
        ("$-5", "-5", True),
        ("it fell to 10-5", "-5", False),
        ("10\u20135", "5", True),
        ("5", "-5", False),
        ("The answer is 18. I checked it 2 times.", "18", True),
        ("#### 18\n(twice 9)", "18", True),
        (r"\boxed{18}, since 9 + 9 = 18, that is 2 * 9.", "18", True),
        ("The answer is 9 + 9 = 18 apples.", "18", True),
        ("#### 17\n#### 18", "18", True),
        ("3 apples and 4 pears are 7", "7", True),
        ("3 apples and 4 pears are 7", "4", False),
        ("x2 = 3", "2", False),
        ("", "0", False),
        ("none", "0", False),
    ],
)
def test_numbers_in_words(text, answer, correct):
    assert scorer_for("gsm8k", answer)(text) is correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("so\n#### 1,234", True),
        ("#### 1234.", True),
        ("#### $1234\n#### 7", True),  # the first
        ("1234", False),
        ("The answer is 1234.", False),
        (r"\boxed{1234}", False),
        ("#### seven", False),
    ],
)
def test_the_strict_reading_wants_the_mark(text, correct):
    assert strict_scorer_for("gsm8k", "way\n#### 1,234")(text) is correct
    assert strict_scorer_for("copy", "tea.") is None


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        (r"So it is $\boxed{\frac12}$.", r"\frac{1}{2}", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        ("\\boxed{\u2212\\frac{1}{2}}", r"-\frac{1}{2}", True),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", True),
        (r"\boxed{10{,}080}", "10,080", True),
        (r"\boxed{12}", r"12 \text{ cm}", True),
        (r"\boxed{90}", r"90^\circ", True),
        (r"\boxed{\left(3,\dfrac{\pi}{2}\right)}", r"(3, \frac{\pi}{2})", True),
        (r"\boxed{(2,5)}", "[2,5)", False),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{4}, no, \boxed{5}", "5", True),
        ("The answer is $5$.", "5", True),
        (r"\boxed{6}", "5", False),
        ("", "5", False),
    ],
)
def test_mathematics(text, answer, correct):
    assert scorer_for("math500", answer)(text) is correct


def test_numbers_too_large_to_be_computed_are_given_up(monkeypatch):
    monkeypatch.setattr(maths, "SECONDS", 3.0)
    score = scorer_for("math500", "3")
    assert score("$3$")  # the process is there
    assert not score(r"\boxed{9^{9^{9^{9}}}}")
    assert score(r"\boxed{6/2}")  # and another one is


DOC = {
    "task_id": "HumanEval/0",
    "prompt": 'from math import tau\n\n\ndef turn(x):\n    """Half a turn more."""\n',
    "test": "def check(candidate):\n    assert candidate(1) == 1 + tau / 2\n",
    "entry_point": "turn",
}
WHOLE = "def turn(x):\n    return x + tau / 2\n"


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("    return x + tau / 2\n", True),
        ("    return x\n", False),
        (WHOLE, True),
        (f"Here it is:\n```python\n{WHOLE}```\nIt adds.", True),
        (f"```\nturn(1)\n```\nor\n```python\n{WHOLE}", True),  # the block with the function; it has no end
        ("```python\n    return x + tau / 2\n```", True),
        ("    return x + tau / 2\n```\nIt adds.", True),  # goes on in a block of the prompt
        ("    return x +", False),
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("", False),
    ],
)
def test_human_eval(text, correct):
    assert scorer_for("humaneval", DOC)(text) is correct


MBPP = {
    "task_id": 601,
    "text": "Write a function to add.",
    "test_list": ["assert add(1, 2) == three", "assert add(0, 0) == 0"],
}


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("def add(a, b):\n    return a + b\n[DONE]\nmore", True),
        ("[BEGIN]\ndef add(a, b):\n    return a + b", True),
        ("```python\ndef add(a, b):\n    return a + b\n```", True),
        ("def add(a, b):\n    return a - b", False),
        ("def plus(a, b):\n    return a + b", False),
    ],
)
def test_mbpp(text, correct):
    assert scorer_for("mbpp", MBPP | {"test_setup_code": "three = 3"})(text) is correct
    assert not scorer_for("mbpp", MBPP)(text)  # nobody says what `three` is


def test_limits_of_programs_are_those_given():
    doc = DOC | {"prompt": "def turn(x):\n", "test": "def check(candidate):\n    candidate(1)\n"}
    text = "    return len(bytearray(300 * 2**20))\n"
    assert scorer_for("humaneval", doc, limits=CodeLimits(memory_mb=1024))(text)
    assert not scorer_for("humaneval", doc, limits=CodeLimits(memory_mb=256))(text)


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        ("gsm8k", "no number", "answer: expected the text of a gsm8k answer, got 'no number'"),
        ("gsm8k", 7, "answer: expected the text of a gsm8k answer, got 7"),
        ("math500", " ", "answer: expected the text of a math500 answer, got ' '"),
        ("paired_choice", "high pair", "answer: expected the text of a paired_choice answer, got 'high pair'"),
        ("latin_square", "a, b; a, b", "answer: expected the text of a latin_square answer"),
        ("humaneval", "text", "answer: expected the fields prompt, test, entry_point of humaneval, got no prompt"),
        ("humaneval", {"prompt": "x", "test": "y"}, "humaneval, got no entry_point"),
        ("mbpp", {"test_list": []}, "answer: expected the fields test_list of mbpp, got no test_list"),
        ("mbpp", {"test_list": [1]}, "answer: expected test_list to hold text, got .1."),
    ],
)
def test_references_that_cannot_be_scored_are_refused(task, answer, message):
    with pytest.raises(UsageError, match=message):
        scorer_for(task, answer)


def test_programs_have_to_be_allowed():
    check_allowed("gsm8k", run_code=False)
    check_allowed("mbpp", run_code=True)
    with pytest.raises(UsageError, match=r"eval.run_code: expected true, as mbpp runs the code .*, got false"):
        check_allowed("mbpp", run_code=False)
