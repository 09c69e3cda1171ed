import collections
import hashlib
import json
import re

import pytest

from dllm_jax.data import tasks
from dllm_jax.evals.scorers import SCORERS

STEP = re.compile(r"so (\d+) ([+*-]) (\d+) = (\d+)\.")


def parse_list(text, *, verb=""):
    prefix = f"{verb} the list: " if verb else ""
    assert text.startswith(prefix)
    assert text.endswith(".")
    return text.removeprefix(prefix).removesuffix(".").split(", ")


def check_list_task(task, prompt, answer, extent):
    words, solved = parse_list(prompt, verb=task.capitalize()), parse_list(answer)
    least, most = extent.words
    assert least <= len(words) <= most
    assert len(set(words)) == len(words)
    assert set(words) <= {word for name in extent.lists for word in tasks.LEXICON[name]}
    expected = {"copy": words, "reverse": words[::-1], "sort": sorted(words), "shuffle": solved}[task]
    assert solved == expected
    assert sorted(solved) == sorted(words)


def check_word_problem(prompt, answer, extent):
    name, start, item = re.match(r"(\w+) has (\d+) (\w+)\. ", prompt).groups()
    assert prompt.endswith(f"How many {item} does {name} have now?")
    assert answer.startswith(f"{name} starts with {start} {item}. ")
    story = prompt.split(". ")[1:-1]
    assert re.sub(r", so [^.]*\.", ".", answer).split(". ")[1:-1] == story
    assert len(story) <= extent.events[1]
    count, signs = int(start), {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for before, sign, operand, after in STEP.findall(answer):
        assert int(before) == count
        count = signs[sign](count, int(operand))
        assert int(after) == count
        assert count >= 1
        assert sign != "*" or count <= tasks.MAX_PRODUCT
    assert answer.endswith(f" The answer is {count}.")


def check(sample, extent):
    if sample["task"] == "word_problem":
        check_word_problem(sample["prompt"], sample["answer"], extent)
    else:
        check_list_task(sample["task"], sample["prompt"], sample["answer"], extent)
    assert SCORERS[sample["task"]](sample["answer"], sample["answer"])


def statistics(samples):
    """Shares of list lengths, or of operators, numbers of events and words, whichever the task has."""
    counts = collections.Counter()
    for sample in samples:
        steps = STEP.findall(sample["answer"])
        counts[f"{len(steps)} events" if steps else f"{sample['answer'].count(',') + 1} words"] += 1 / len(samples)
        for _, sign, _, _ in steps:
            counts[sign] += 1 / len(samples)
    return counts


def held_out(task, path=tasks.HELD_OUT):
    return [sample for sample in tasks.read(path) if sample["task"] == task]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_generated_and_held_out_samples_follow_the_same_rules(task):
    generated = list(tasks.generate(task, 2000, seed=0))
    for sample in generated + held_out(task):
        assert set(sample) == {"id", "task", "prompt", "answer"}
        assert sample["task"] == task
        check(sample, tasks.SHORT)
    got, expected = statistics(generated), statistics(held_out(task))
    for name in got | expected:
        assert got[name] == pytest.approx(expected[name], abs=0.2), name  # 100 held-out samples: 4 standard errors


@pytest.mark.parametrize("task", tasks.TASKS)
def test_longer_samples_follow_the_same_rules_and_come_in_all_lengths(task):
    generated = list(tasks.generate(task, 1000, seed=0, extent=tasks.LONG))
    for sample in generated + held_out(task, tasks.HELD_OUT_LONG):
        assert set(sample) == {"id", "task", "prompt", "answer"}
        check(sample, tasks.LONG)
    assert len({sample["prompt"] for sample in generated}) == 1000
    separator, lengths = (". ", range(4, 9)) if task == "word_problem" else (", ", range(10, 41))
    come = {sample["prompt"].count(separator) + (task != "word_problem") for sample in generated}
    assert come >= set(lengths)


def test_the_longer_held_out_samples_are_draws():
    drawn = [
        sample
        for task in tasks.TASKS
        for sample in tasks.generate(task, 40, seed=1000, exclude=prompts(tasks.HELD_OUT), extent=tasks.LONG)
    ]
    assert drawn == tasks.read(tasks.HELD_OUT_LONG)


def prompts(path):
    return {sample["prompt"] for sample in tasks.read(path)}


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("word_problem", "9ffc50112071cdcb"),
        ("copy", "1626b0d6a60c0445"),
        ("reverse", "122dfd38c3c66f3f"),
        ("sort", "639d22f30b56bc2a"),
        ("shuffle", "1d7addd1877a9bf2"),
        ("latin_square", "bf697cb258438ed6"),
        ("paired_choice", "8dfad43dc49e3031"),
    ],
)
def test_the_draws_of_a_seed_stay_what_they_were(task, digest):
    drawn = json.dumps(list(tasks.generate(task, 200, seed=7)))
    assert hashlib.sha256(drawn.encode()).hexdigest().startswith(digest)


def test_the_same_seed_gives_the_same_samples():
    first = list(tasks.generate("shuffle", 5, seed=3))
    assert first == list(tasks.generate("shuffle", 5, seed=3))
    assert first != list(tasks.generate("shuffle", 5, seed=4))


def test_excluded_prompts_never_come():
    ordinary = list(tasks.generate("sort", 20, seed=0))
    excluded = {sample["prompt"] for sample in ordinary[:7]}
    remaining = list(tasks.generate("sort", 13, seed=0, exclude=excluded))
    assert [sample["prompt"] for sample in remaining] == [sample["prompt"] for sample in ordinary[7:]]


def test_the_shipped_files():
    everything, small = tasks.read(tasks.HELD_OUT), tasks.read(tasks.HELD_OUT_SMALL)
    assert collections.Counter(sample["task"] for sample in everything) == dict.fromkeys(tasks.TASKS, 100)
    assert collections.Counter(sample["task"] for sample in small) == dict.fromkeys(tasks.TASKS, 20)
    assert all(sample in everything for sample in small)
    longer = tasks.read(tasks.HELD_OUT_LONG)
    assert collections.Counter(sample["task"] for sample in longer) == dict.fromkeys(tasks.TASKS, 40)
    assert tasks.held_out_prompts() == prompts(tasks.HELD_OUT) | prompts(tasks.HELD_OUT_LONG)
    assert len(tasks.held_out_prompts()) == 700


def test_training_shares_add_up():
    for shares in (tasks.TRAINING_SHARES, tasks.EQUAL_SHARES, tasks.LIST_SHARES):
        assert tuple(shares) == tasks.TASKS
        assert sum(shares.values()) == pytest.approx(1)
    assert tasks.TRAINING_SHARES["word_problem"] == 0.65
