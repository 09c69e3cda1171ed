"""A race of decoders in a terminal: a still picture of a step, or the whole race in place."""

import functools
import time
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dllm_jax.viewer import colours
from dllm_jax.viewer.choice import Race
from dllm_jax.viewer.layout import Part, fitted, lines, printable
from dllm_jax.viewer.trace import MASK, Cell, State, Trace

LEAST_COLUMNS = 40  # of a decoder; narrower terminals have fewer side by side
FRAMES_PER_SECOND = 30
_BOLD, _STRUCK = (State.NOW, State.RETRACTED), (State.REJECTED, State.RETRACTED)
_STYLES = {
    state: Style(color=ink, bgcolor=paper, bold=state in _BOLD, strike=state in _STRUCK)
    for state, (ink, paper) in colours.STATES.items()
} | {State.MASKED: Style(dim=True), State.EARLIER: Style(), State.CUT: Style(dim=True)}
_OPEN, _SEED = Style(color=colours.BLOCK), Style(color=colours.SEED[0], bgcolor=colours.SEED[1], bold=True)
_EDGE = Style(underline2=True)


def picture(race: Race, step: int, *, width: int, height: int) -> RenderableType:
    """All decoders at a step, as many side by side as there is room for.

    Args:
        race: the decoders.
        step: what is shown.
        width: columns there are.
        height: lines there are for a canvas.
    """
    side_by_side, _ = _places(race, width=width)
    columns = max(width // side_by_side - 4, 8)
    table = Table.grid(expand=True)
    for _ in range(side_by_side):
        table.add_column(ratio=1)
    panels = [_panel(trace, step, columns=columns, height=height) for trace in race.traces]
    for at in range(0, len(panels), side_by_side):
        table.add_row(*panels[at : at + side_by_side])
    return table


def canvas(trace: Trace, step: int, *, width: int, height: int) -> Text:
    """The canvas at a step, or the lines of it where something happens.

    Args:
        trace: the decoder.
        step: what is shown.
        width: columns of a line.
        height: lines at most.
    """
    cells = trace.cells(step)
    layout = lines([trace.text(place) for place in range(len(trace.tokens))], width=width)
    while len(layout) > 1 and all(cells[part.place].state is State.CUT for part in layout[-1]):
        layout.pop()
    busy = next((i for i, line in enumerate(layout) if any(cells[part.place].is_open for part in line)), 0)
    top = max(min(busy - height // 3, len(layout) - height), 0)
    text = Text(no_wrap=True)
    for number, line in enumerate(layout[top : top + height]):
        text.append("\n" if number else "")
        for part in line:
            text.append(*_styled(cells[part.place], part))
    return text


def play(race: Race, console: Console, *, speed: float) -> None:
    """The race in place, from the first forward to the last.

    Args:
        race: the decoders.
        console: a terminal.
        speed: forwards per second.
    """
    steps = range(race.forwards + 1)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        replay(live, [functools.partial(_fitting, race, step, console) for step in steps], speed=speed)


def replay(live: Live, frames: Sequence[Callable[[], RenderableType]], *, speed: float) -> None:
    """Shows one frame after the other.

    Args:
        live: where.
        frames: functions that make them, called only for those that are shown.
        speed: frames per second; where they are more than a terminal shows, some are left out, never the last.
    """
    begin = time.monotonic()
    for number, frame in enumerate(frames):
        wait = begin + number / speed - time.monotonic()
        is_last = number == len(frames) - 1
        if wait < -1 / FRAMES_PER_SECOND and not is_last:
            continue
        time.sleep(max(wait, 0))
        live.update(frame(), refresh=True)


def _fitting(race: Race, step: int, console: Console) -> RenderableType:
    """A frame that is as high as the terminal at most."""
    size = console.size
    _, stories = _places(race, width=size.width)
    return picture(race, step, width=size.width, height=max((size.height - 2) // stories - 3, 1))


def _places(race: Race, *, width: int) -> tuple[int, int]:
    """How many decoders stand side by side, and how many one above the other: as evenly as can be."""
    fitting = max(min(len(race.traces), width // LEAST_COLUMNS), 1)
    stories = -(-len(race.traces) // fitting)
    return -(-len(race.traces) // stories), stories


def _panel(trace: Trace, step: int, *, columns: int, height: int) -> Panel:
    counts = trace.counts(step)
    parts = ["done"] if step >= trace.nfe else []
    parts += [f"forward {counts.forward}/{trace.nfe}", trace.phase(step), f"{counts.masks_left} masks"]
    parts += [f"{counts.tokens_per_forward:.2f} per forward"]
    told = Text(", ".join(filter(None, parts)), style="dim", overflow="ellipsis", no_wrap=True)
    body = Group(canvas(trace, step, width=columns, height=height), told)
    title = Text(printable(trace.label), style="bold")
    return Panel(body, title=title, title_align="left", box=box.ROUNDED, border_style="dim")


def _styled(cell: Cell, part: Part) -> tuple[str, Style]:
    """What is seen of a part of a token, and how."""
    style = _STYLES[cell.state]
    if cell.state is State.CUT:
        return "╱" * len(part.text), style
    if cell.state is State.MASKED:
        text = "".join(MASK if c not in " ↵" else c for c in part.text)
        style = _OPEN if cell.is_open else style
    elif cell.state in (State.REJECTED, State.RETRACTED):
        text = fitted(cell.text if part.begins else "", part)
    else:
        text = part.text
    if cell.is_seed:
        style = _SEED
    if cell.opens_cluster or cell.closes_cluster:
        style += _EDGE
    return text, style
