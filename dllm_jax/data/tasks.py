"""The built-in tasks: the distribution the bundled models were trained on, and its held-out samples.

Word problems need a chain of calculations, which the answer spells out. Copy, reverse and sort have one right answer,
so their tokens may be committed in any order. In shuffle every position is uncertain and no word may come twice, so
committing dependent positions together must fail. `dllm_jax/evals/scorers.py` says what counts as correct. All five are
also drawn longer (`LONG`), for models of longer canvases.

Two more tasks are for models that know more: the bundled ones have never seen them. In a Latin square every word rules
itself out in its row and column; of a choice among pairs ("high card", "two pair") both words are uncertain, and only
some go together. A decoder that commits such positions at once mixes them, however good its model is.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Extent:
    """How long the samples of a task are; bounds are included."""

    words: tuple[int, int]  # of a list, all different
    events: tuple[int, int]  # of a word problem, before those that would multiply beyond `MAX_PRODUCT` are dropped
    lists: tuple[str, ...]  # those of the lexicon that words are drawn from
    suffix: str  # of the task in ids; with another one the draws are others


SHORT = Extent(words=(3, 9), events=(2, 3), lists=("words",), suffix="")  # what the bundled models are measured on
LONG = Extent(words=(10, 40), events=(4, 8), lists=("words", "more_words"), suffix="-long")

Sampler = Callable[[random.Random, Extent], tuple[str, str]]  # -> (prompt, answer)

ASSETS = Path(__file__).parents[1] / "assets"
HELD_OUT = ASSETS / "tasks_eval.jsonl"  # 100 of each task
UNSEEN = ASSETS / "tasks_unseen.jsonl"  # 50 of each unseen task
HELD_OUT_SMALL = ASSETS / "tasks.jsonl"  # every fifth of the held-out ones
HELD_OUT_LONG = ASSETS / "tasks_long_eval.jsonl"  # 40 of each task, `LONG`

LEXICON: dict[str, list[str]] = json.loads((ASSETS / "lexicon.json").read_text(encoding="utf-8"))
PAIRS: list[list[str]] = json.loads((ASSETS / "pairs.json").read_text(encoding="utf-8"))
SQUARE_SIDES = (3, 4)
START, CHANGE = (2, 20), (2, 20)
GAIN_SHARE, LOSS_SHARE = 0.45, 0.43  # of the events; the rest doubles or triples
SMALL = 4  # a pile below this only grows by a gain
MAX_PRODUCT = 60  # an event that multiplies beyond this is dropped


def _word_problem(rng: random.Random, extent: Extent) -> tuple[str, str]:
    """A story of some events on a pile of items, and its solution with every intermediate result."""
    name, item = rng.choice(LEXICON["names"]), rng.choice(LEXICON["items"])
    start = count = rng.randint(*START)
    story, solution = [], []
    for _ in range(rng.randint(*extent.events)):
        happening, sign, operand = _event(rng, count)
        result = {"+": count + operand, "-": count - operand, "*": count * operand}[sign]
        if sign == "*" and result > MAX_PRODUCT:
            continue
        sentence = f"{rng.choice(LEXICON['leads'])} {name} {happening}"
        story.append(f"{sentence}. ")
        solution.append(f"{sentence}, so {count} {sign} {operand} = {result}. ")
        count = result
    prompt = f"{name} has {start} {item}. {''.join(story)}How many {item} does {name} have now?"
    return prompt, f"{name} starts with {start} {item}. {''.join(solution)}The answer is {count}."


def _event(rng: random.Random, count: int) -> tuple[str, str, int]:
    """What happens to a pile of `count` items, as a phrase, an operator and its operand."""
    draw = rng.random()
    if draw < GAIN_SHARE or count < SMALL:
        operand = rng.randint(*CHANGE)
        return rng.choice(LEXICON["gain"]).format(b=operand), "+", operand
    if draw < GAIN_SHARE + LOSS_SHARE:
        operand = rng.randint(1, min(CHANGE[1], count - 1))
        return rng.choice(LEXICON["loss"]).format(b=operand), "-", operand
    factor = rng.randrange(len(LEXICON["multiply"]))
    return LEXICON["multiply"][factor], "*", factor + 2


def _list_task(verb: str, solve: Callable[[random.Random, list[str]], list[str]]) -> Sampler:
    """A task on a list of distinct words, from what it is called and how it is solved."""

    def sample(rng: random.Random, extent: Extent) -> tuple[str, str]:
        lexicon = [word for name in extent.lists for word in LEXICON[name]]
        words = rng.sample(lexicon, rng.randint(*extent.words))
        return f"{verb} the list: {', '.join(words)}.", f"{', '.join(solve(rng, words))}."

    return sample


def _latin_square(rng: random.Random, _: Extent) -> tuple[str, str]:
    """A square in which every one of a few words stands once in every row and column, and one of many solutions."""
    words = rng.sample(LEXICON["words"], rng.randint(*SQUARE_SIDES))
    side = len(words)
    rows, columns = (rng.sample(range(side), side) for _ in range(2))
    square = [", ".join(words[(row + column) % side] for column in columns) for row in rows]
    return f"Make a Latin square of the words {', '.join(words)}. Rows end with ;", f"{'; '.join(square)}."


def _paired_choice(rng: random.Random, _: Extent) -> tuple[str, str]:
    """A choice among terms of two words that may not be mixed, and one of the right answers."""
    pairs = list(rng.choice(PAIRS))
    rng.shuffle(pairs)
    return f"Choose one of these and write nothing else: {', '.join(pairs)}.", f"{rng.choice(pairs)}."


_SAMPLERS: dict[str, Sampler] = {
    "word_problem": _word_problem,
    "copy": _list_task("Copy", lambda _, words: words),
    "reverse": _list_task("Reverse", lambda _, words: words[::-1]),
    "sort": _list_task("Sort", lambda _, words: sorted(words)),
    "shuffle": _list_task("Shuffle", lambda rng, words: rng.sample(words, len(words))),
}
TASKS = tuple(_SAMPLERS)  # of the bundled models' training
_SAMPLERS |= {"latin_square": _latin_square, "paired_choice": _paired_choice}
UNSEEN_TASKS = tuple(task for task in _SAMPLERS if task not in TASKS)
TRAINING_SHARES = {task: 0.65 if task == "word_problem" else 0.35 / 4 for task in TASKS}
EQUAL_SHARES = {task: 1 / len(TASKS) for task in TASKS}
LIST_SHARES = {task: 0 if task == "word_problem" else 1 / 4 for task in TASKS}


def generate(
    task: str, count: int, *, seed: int, exclude: Collection[str] = (), extent: Extent = SHORT
) -> Iterator[dict[str, str]]:
    """Draws samples of one task; the same arguments give the same samples.

    Args:
        task: one of `TASKS` or `UNSEEN_TASKS`.
        count: how many.
        seed: of the draws; every task has its own stream.
        exclude: prompts never to return, e.g. `held_out_prompts()`.
        extent: how long they are; the unseen tasks have one length only.

    Yields:
        `{"id", "task", "prompt", "answer"}`, as the lines of a task file.
    """
    name = f"{task}{extent.suffix}"
    rng = random.Random(f"{name} {seed}")
    done = 0
    while done < count:
        prompt, answer = _SAMPLERS[task](rng, extent)
        if prompt in exclude:
            continue
        done += 1
        yield {"id": f"{name}-{seed}-{done}", "task": task, "prompt": prompt, "answer": answer}


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a task file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def held_out_prompts() -> frozenset[str]:
    """The prompts every reported accuracy is measured on; training data must not hold them."""
    return frozenset(sample["prompt"] for path in (HELD_OUT, HELD_OUT_LONG) for sample in read(path))
