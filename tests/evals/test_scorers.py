import pytest

from dllm_jax.errors import UsageError
from dllm_jax.evals.scorers import SCORERS, scorer_for

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
