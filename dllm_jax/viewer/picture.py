"""A race of decoders as an animated GIF, for a README."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont
from rich.cells import cell_len

from dllm_jax.viewer import colours
from dllm_jax.viewer.choice import Race
from dllm_jax.viewer.layout import Part, fitted, lines, printable
from dllm_jax.viewer.trace import MASK, Cell, State, Trace

SIZE = 14  # of the letters, in pixels
MARGIN, GAP, LINE = 12, 12, 24
MOST_FRAMES = 200
HELD_MS = 3000  # the last frame
BLENDS = 4  # between ink and paper, for the edges of letters


class Letters(NamedTuple):
    """The fonts of a picture, and the width of a letter in pixels."""

    plain: ImageFont.FreeTypeFont
    bold: ImageFont.FreeTypeFont
    width: int


def gif(race: Race, *, title: str, columns: int, speed: float) -> bytes:
    """The picture.

    Args:
        race: the decoders, side by side.
        title: a line above them; empty: none.
        columns: letters in a line of a decoder.
        speed: forwards per second.
    """
    letters = _letters()
    layouts = [lines([trace.text(place) for place in range(len(trace.tokens))], width=columns) for trace in race.traces]
    stride = math.ceil((race.forwards + 1) / MOST_FRAMES)
    steps = [*range(0, race.forwards, stride), race.forwards]
    frames = [_frame(race, layouts, step, title=title, columns=columns, letters=letters) for step in steps]
    flat = [frame.quantize(palette=_palette(), dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    durations = [round(1000 * stride / speed)] * (len(flat) - 1) + [HELD_MS]
    flat[0].save(
        file, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=True, disposal=1
    )
    return file.getvalue()


def _letters() -> Letters:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(str(folder / f"DejaVuSansMono{kind}.ttf"), SIZE) for kind in ("", "-Bold"))
    return Letters(plain, bold, math.ceil(plain.getlength("m")))


def _palette() -> Image.Image:
    """All colours of a picture: of every pair of ink and paper, and what lies between."""
    pairs = [*colours.STATES.values(), colours.SEED, (colours.INK, colours.CARD), (colours.INK, colours.PAGE)]
    pairs += [(colours.FAINT, colours.CARD), (colours.STATES[State.MASKED][0], colours.FAR)]
    flat = {_blend(*pair, at / BLENDS) for pair in pairs for at in range(BLENDS + 1)}
    flat |= {ImageColor.getrgb(c) for c in (colours.BLOCK, colours.CLUSTER, colours.FILTER, colours.LINE, colours.MASK)}
    image = Image.new("P", (1, 1))
    image.putpalette([channel for colour in sorted(flat) for channel in colour])
    return image


def _blend(ink: str, paper: str, share: float) -> tuple[int, ...]:
    pairs = zip(ImageColor.getrgb(ink), ImageColor.getrgb(paper), strict=True)
    return tuple(round(a + (b - a) * share) for a, b in pairs)


def _frame(
    race: Race, layouts: Sequence[list[list[Part]]], step: int, *, title: str, columns: int, letters: Letters
) -> Image.Image:
    """The picture at a step."""
    wide = columns * letters.width + 2 * MARGIN
    top = MARGIN + (LINE + 4 if title else 0)
    high = max(map(len, layouts)) * LINE + 2 * LINE + 2 * MARGIN
    count = len(race.traces)
    image = Image.new("RGB", (count * wide + (count + 1) * GAP, top + high + GAP), colours.PAGE)
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((GAP, MARGIN), printable(title), fill=colours.INK, font=letters.bold)
    for number, (trace, layout) in enumerate(zip(race.traces, layouts, strict=True)):
        left = GAP + number * (wide + GAP)
        draw.rounded_rectangle((left, top, left + wide, top + high), 8, fill=colours.CARD, outline=colours.LINE)
        _head(draw, trace, step, (left + MARGIN, top + MARGIN), width=wide - 2 * MARGIN, letters=letters)
        cells = trace.cells(step)
        for row, line in enumerate(layout):
            x, y = left + MARGIN, top + MARGIN + 2 * LINE + row * LINE
            for part in line:
                width = cell_len(part.text) * letters.width
                if width:
                    _cell(draw, cells[part.place], part, (x, y, x + width - 1, y + LINE - 5), letters=letters)
                x += width
    return image


def _head(
    draw: ImageDraw.ImageDraw, trace: Trace, step: int, at: tuple[int, int], *, width: int, letters: Letters
) -> None:
    """The name of a decoder, its forwards, and a bar of what is decoded."""
    x, y = at
    counts = trace.counts(step)
    done = "done: " if step >= trace.nfe else ""
    told = f"{done}{counts.forward} / {trace.nfe} forwards"
    end = x + width - letters.plain.getlength(told)
    label = printable(trace.label)
    while label and x + letters.bold.getlength(label) > end - letters.width:
        label = label[:-1]
    draw.text((x, y - 2), label, fill=colours.INK, font=letters.bold)
    draw.text((end, y - 2), told, fill=colours.FAINT, font=letters.plain)
    share = 1 - counts.masks_left / max(len(trace.tokens), 1)
    bar = y + LINE
    draw.rectangle((x, bar, x + width, bar + 5), fill=colours.MASK)
    if share:
        draw.rectangle((x, bar, x + round(width * share), bar + 5), fill=colours.STATES[State.NOW][1])


def _cell(
    draw: ImageDraw.ImageDraw, cell: Cell, part: Part, box: tuple[int, int, int, int], *, letters: Letters
) -> None:
    """A token in its box, with the signs of its state."""
    x, y, right, bottom = box
    ink, paper = colours.SEED if cell.is_seed else colours.STATES[cell.state]
    if cell.state is State.MASKED and not cell.is_open:
        paper = colours.FAR
    draw.rectangle(box, fill=paper)
    if cell.state is State.CUT:
        _hatch(draw, box, ink=ink)
        return
    same = cell.state in (State.NOW, State.EARLIER, State.MASKED)
    text = part.text if same else fitted(cell.text if part.begins else "", part)
    if cell.state is State.MASKED:
        text = "".join(MASK if c not in " ↵" else c for c in text)
    font = letters.bold if cell.state in (State.NOW, State.RETRACTED) or cell.is_seed else letters.plain
    for number, character in enumerate(text):
        before = cell_len(text[:number]) * letters.width
        draw.text((x + before, y + 1), character, fill=ink, font=font)
    if cell.state in (State.REJECTED, State.RETRACTED):
        draw.line((x, (y + bottom) // 2 + 1, right, (y + bottom) // 2 + 1), fill=ink)
    if cell.filter is not None:
        draw.rectangle((x, y, x + round((right - x) * cell.filter), y + 2), fill=colours.FILTER)
    if cell.is_open:
        draw.line((x, bottom + 1, right, bottom + 1), fill=colours.BLOCK, width=2)
    if cell.is_seed:
        draw.rectangle(box, outline=colours.INK)
    if cell.opens_cluster and part.begins:
        draw.line((x, y, x, bottom), fill=colours.CLUSTER, width=3)
    if cell.closes_cluster and part.ends:
        draw.line((right, y, right, bottom), fill=colours.CLUSTER, width=3)


def _hatch(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], *, ink: str) -> None:
    """Lines from the lower left to the upper right of a box."""
    x, y, right, bottom = box
    for foot in range(x - (bottom - y), right, 6):
        head = foot + bottom - y
        begin = (max(foot, x), bottom - max(x - foot, 0))
        draw.line((*begin, min(head, right), y + max(head - right, 0)), fill=ink)
