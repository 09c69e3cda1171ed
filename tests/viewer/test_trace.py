"""Traces read back: what stands at every position at every step, and lines that are no traces."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_jax.errors import UsageError
from dllm_jax.viewer.choice import races
from dllm_jax.viewer.trace import SPECIAL, State, from_row, read
from tests.viewer import rows


def letters(row: dict[str, Any], k: int) -> str:
    """The states of a step: m masked, n now, e earlier, j rejected, t taken back, c cut."""
    signs = {State.MASKED: "m", State.NOW: "n", State.EARLIER: "e", State.REJECTED: "j", State.RETRACTED: "t"}
    return "".join(signs.get(cell.state, "c") for cell in from_row(row).cells(k))


@pytest.mark.parametrize(
    ("row", "states"),
    [
        (rows.line(), ["mmmmmmmm", "nnmmmmmm", "eennmmmm", "eeeennmm", "eeeeeenn", "eeeeeeee"]),
        (rows.apd(), ["mmmmmmmm", "nnjjmmmm", "eennnccc", "eeeeeccc"]),
        (rows.dico(), ["mmmmmmmm", "mnmmmmnm", "nennnnen", "eeeeeeee"]),
        (rows.wino(), ["mmmmmmmm", "nnnnnnnn", "teeeeeee", "neeeeeee", "eeeeeeee"]),
        (rows.learn2pd(), ["mmmmmmmm", "nnmmnmcc", "eenncccc", "eeeecccc"]),
    ],
    ids=["threshold", "apd", "dico", "wino", "learn2pd"],
)
def test_states(row: dict[str, Any], states: list[str]) -> None:
    assert [letters(row, k) for k in range(len(states))] == states


def test_texts_are_those_of_the_forward() -> None:
    assert [cell.text for cell in from_row(rows.line()).cells(4)] == rows.TEXT
    assert [cell.text for cell in from_row(rows.apd()).cells(1)][2:5] == [" x", "return", SPECIAL]  # drafts, a special
    assert from_row(rows.learn2pd()).cells(1)[4].text == " x"  # committed, then cut off
    taken = from_row(rows.wino())
    assert [taken.cells(k)[0].text for k in range(1, 4)] == [" x", " x", "def"]


def test_signs_of_decoders() -> None:
    cells = from_row(rows.dico()).cells(1)
    assert [cell.is_seed for cell in cells] == [False, True, False, False, False, False, True, False]
    assert [place for place, cell in enumerate(cells) if cell.opens_cluster] == [0, 6]
    assert [place for place, cell in enumerate(cells) if cell.closes_cluster] == [2, 6]
    assert [cell.filter for cell in from_row(rows.learn2pd()).cells(2)[:5]] == [None, None, 0.97, 0.5, None]
    blocks = [[cell.is_open for cell in from_row(rows.line()).cells(k)] for k in (0, 2, 3, 5)]
    assert blocks == [[True] * 4 + [False] * 4, [True] * 4 + [False] * 4, [False] * 4 + [True] * 4, [False] * 8]


def test_counts() -> None:
    counts = from_row(rows.line()).counts(3)
    assert (counts.forward, counts.committed, counts.masks_left, counts.tokens_per_forward) == (3, 2, 2, 2.0)
    assert (counts.least, counts.mean) == (0.8, pytest.approx(0.85))
    assert from_row(rows.line()).counts(9) == from_row(rows.line()).counts(5)  # all forwards are over
    assert from_row(rows.apd()).counts(2).masks_left == 0


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    return path


def test_line_breaks_of_other_kinds_are_text(tmp_path: Path) -> None:
    (trace,) = read(write(tmp_path / "out.jsonl", rows.line(pieces=["a\u2028b\x85", *rows.TEXT[1:]])), label="")
    assert trace.text(0) == "a\u2028b\x85"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pieces": rows.TEXT[:3]}, "lists of 3, 8 positions"),
        ({"commit_step": "no"}, "invalid literal"),
        ({"steps": [{"block": [0, 4]}]}, "no 'open'"),
        ({"steps": [{"block": [0, 4], "end": 8, "open": [1], "draft": [], "confidence": [0.1]}]}, "different lengths"),
        ({"nfe": None}, "int()"),
        ({"decoder": 3}, "not iterable"),
    ],
)
def test_a_line_that_is_no_trace(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "out.jsonl", rows.line(), rows.line(**changes))
    with pytest.raises(UsageError, match=r"out.jsonl:2: expected a line of a run with output.trace=true, got") as told:
        read(path, label="")
    assert expected in str(told.value)


def test_files_without_traces(tmp_path: Path) -> None:
    plain = {name: value for name, value in rows.line().items() if name not in ("pieces", "steps")}
    for content, expected in [
        (json.dumps(plain), "got one without a trace"),
        ("[1]", "expected a JSON object"),
        ("", "expected a JSON object"),
    ]:
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(UsageError, match=expected):
            read(tmp_path / "out.jsonl", label="")
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none.jsonl", label="")


def test_which_traces_stand_together(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", rows.line(id=1), rows.line(id=2), rows.line(id=3))
    two = write(tmp_path / "two.jsonl", rows.apd() | {"id": 3}, rows.apd() | {"id": 1})
    found, left_out = races([one, two], labels=[], ids=[], most=1)
    assert ([race.id for race in found], left_out, found[0].forwards) == (["1"], 1, 4)
    assert [trace.label for trace in found[0].traces] == ["threshold, dual cache", "apd, window cache"]
    ((race,), _) = races([one, two], labels=["a", "b"], ids=["3"], most=9)
    assert [trace.label for trace in race.traces] == ["a", "b"]
    ((race, *_), _) = races([one, one], labels=[], ids=[], most=9)
    assert race.traces[0].label == "threshold, dual cache (one)"
    other = write(tmp_path / "other.jsonl", rows.line(id=1, prompt_text="Another."))
    for files, labels, ids, expected in [
        ([one] * 5, [], [], "1 to 4 outputs with traces, got 5"),
        ([one], ["a", "b"], [], "--labels: expected one per output"),
        ([one, two], [], ["2"], "--ids: expected ids that every output has, got '2'"),
        ([one, other], [], [], "the same prompt under id '1'"),
    ]:
        with pytest.raises(UsageError, match=expected):
            races(files, labels=labels, ids=ids, most=9)
