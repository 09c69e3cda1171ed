"""Canvases as lines of characters, in pictures and in terminals."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from rich.console import Console

from dllm_jax.viewer import colours, layout, terminal
from dllm_jax.viewer.choice import Race
from dllm_jax.viewer.picture import gif
from dllm_jax.viewer.trace import State, from_row
from tests.viewer import rows

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e<b>"


def race(*lines: dict) -> Race:
    traces = tuple(from_row(line) for line in lines)
    return Race("a", traces[0].prompt, traces)


def texts(tokens: list[str], width: int) -> list[str]:
    return ["".join(part.text for part in line) for line in layout.lines(tokens, width=width)]


def test_lines_break_before_words_and_at_line_breaks() -> None:
    assert texts(["A", "nna", " starts", " with", " ", "1", "8", " cards"], 12) == ["Anna starts", "with 18", "cards"]
    assert texts(["Anna", " starts", " ", "18", "."], 12) == ["Anna starts ", "18."]  # the blank stays behind
    assert texts(["a", "\n\n", "    ", "return", " x"], 20) == ["a↵", "↵", "    return x"]
    assert texts(["x" * 25], 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert texts(["", "b"], 10) == [" b"]  # a token of no text has a place
    assert texts(["\t", "x"], 10) == ["    x"]


def test_every_token_has_a_place_whatever_the_width() -> None:
    tokens = ["日本", "語", "", "\r\n", " a", "b" * 9, "\u200d", HOSTILE, " ", " ", "end"]
    for width in range(1, 30):
        parts = [part for line in layout.lines(tokens, width=width) for part in line]
        assert [part.place for part in parts if part.begins] == list(range(len(tokens)))
        assert [part.place for part in parts if part.ends] == list(range(len(tokens)))


def test_nothing_moves_the_cursor_or_reorders_text() -> None:
    assert layout.printable(HOSTILE) == "␛]0;owned␇␛[2J\N{REPLACEMENT CHARACTER}<b>"
    assert layout.printable("\ud800") == "\N{REPLACEMENT CHARACTER}"
    line = rows.line(pieces=[HOSTILE, *rows.TEXT[1:]], decoder={"policy": HOSTILE})
    for k in range(5):
        console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="truecolor")
        console.print(terminal.picture(race(line), k, width=60, height=9))
        shown = console.file.getvalue()
        assert "\x1b]" not in shown
        assert "\x1b[2J" not in shown
        assert "\u202e" not in shown
        assert "\x07" not in shown
    assert "␛]0;owned" in shown


def test_a_terminal_shows_the_canvas_of_a_step() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal.picture(race(rows.line(), rows.apd()), 2, width=100, height=9))
    shown = console.file.getvalue()
    first = [line.split("│")[1][1:].rstrip() for line in shown.splitlines()[1:3]]
    second = shown.splitlines()[1].split("│")[3].strip()
    assert first[0] == "def f(x):↵"  # committed, and the mask of a line break
    assert first[1].startswith("    ····")
    assert second == "def f(x):▫╱╱╱"
    assert "forward 2/4, 4 masks, 2.00 per forward" in shown
    assert "done, forward 2/2, 0 masks" in shown


def test_a_long_canvas_is_shown_where_something_happens() -> None:
    many = 60
    tokens = [1, 2] * (many // 2)
    steps = [
        {"block": [40, 60], "end": many, "open": [40], "draft": [1], "confidence": [0.5]},
    ]
    line = rows.line(
        output_ids=tokens,
        pieces=[f"w{i}\n" for i in range(many)],
        commit_step=[1] * many,
        confidence=[0.5] * many,
        steps=steps,
        nfe=1,
        end=many,
    )
    shown = terminal.canvas(from_row(line), 1, width=20, height=9).plain.splitlines()
    assert len(shown) == 9
    assert any("w40" in each for each in shown)


def test_a_picture_shows_every_forward_in_its_colours() -> None:
    with Image.open(io.BytesIO(gif(race(rows.apd(), rows.wino()), title="Write f.", columns=14, speed=4.0))) as image:
        assert image.n_frames == 4
        durations, seen = [], []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
            colours_of_frame = image.convert("RGB").getcolors(maxcolors=1 << 16)
            seen.append({colour for count, colour in colours_of_frame if count > 100})  # edges of letters are few
    assert durations == [250, 250, 250, 3000]

    def paper(state: State) -> tuple[int, ...]:
        return ImageColor.getrgb(colours.STATES[state][1])

    assert [paper(State.NOW) in frame for frame in seen] == [False, True, True, True]
    assert [paper(State.REJECTED) in frame for frame in seen] == [False, True, False, False]
    assert [paper(State.RETRACTED) in frame for frame in seen] == [False, False, True, False]


@pytest.mark.parametrize("state", State)
def test_colours_differ_in_grey(state: State) -> None:
    def grey(colour: str) -> float:
        red, green, blue = ImageColor.getrgb(colour)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    ink, paper = colours.STATES[state]
    assert abs(grey(ink) - grey(paper)) > (40 if state in (State.MASKED, State.CUT) else 90)
    other = {State.NOW: State.EARLIER, State.RETRACTED: State.REJECTED}.get(state)
    if other:
        assert abs(grey(paper) - grey(colours.STATES[other][1])) > 90


def test_the_style_sheet_has_these_colours() -> None:
    sheet = (Path(colours.__file__).parent / "page" / "page.css").read_text()
    defined = {name.split(":")[0] for name in colours.variables().split("--")[1:]}
    used = {name.split(")")[0] for name in sheet.split("var(--")[1:]} - {"share", "heat", "heat-ink"}
    assert used <= defined
