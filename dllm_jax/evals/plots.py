"""The pictures of a report, as SVG text. This module alone needs Matplotlib, the extra `report`.

Colours are those of Okabe and Ito, which people who see colours differently can tell apart; every method has a marker
or a line style besides. Text stays text, and nothing in it is taken for mathematics: it comes from results.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dllm_jax.evals.anatomy import KINDS, Calibration
from dllm_jax.evals.statistics import Estimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":")
KIND_COLOURS = dict(zip(KINDS, ("#0072B2", "#E69F00", "#BBBBBB"), strict=True))
GREY = "#777777"
SVG = "http://www.w3.org/2000/svg"
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


class Look(NamedTuple):
    """How a method, or a variant, is drawn everywhere."""

    colour: str
    marker: str
    line: str


class Point(NamedTuple):
    """A variant in the plane of speed and accuracy."""

    name: str
    method: str
    speed: Estimate  # tokens per forward
    accuracy: Estimate


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for every name; the pairs of colour and marker repeat after 63."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, name in enumerate(names)
    }


def plane(points: Sequence[Point], *, line: Sequence[int], named: Mapping[str, Look]) -> str:
    """Accuracy over tokens per forward with both intervals; the Pareto line's points are named.

    Args:
        points: all variants.
        line: of them, from slow to fast.
        named: the look of every method.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        axes = figure.subplots()
        _draw_plane(axes, points, line=line, named=named)
        for place, i in enumerate(line):
            point, above = points[i], place % 2 == 0
            axes.annotate(
                point.name,
                (point.speed.value, point.accuracy.value),
                (0, 14 if above else -14),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            )
        axes.set_ylabel("accuracy")
        axes.set_xlabel("tokens per forward")
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: (i > 0, labels[i]))  # the line is the first
        legend = [[each[i] for i in order] for each in (handles, labels)]
        figure.legend(*legend, loc="outside right upper", fontsize=8, ncols=1 + len(labels) // 34)
        return _svg(figure, "plane", [point.name for point in points])


def planes(tasks: Mapping[str, tuple[Sequence[Point], Sequence[int]]], *, named: Mapping[str, Look]) -> str:
    """The same for every task, small and without names.

    Args:
        tasks: points and Pareto line of each.
        named: the look of every method.
    """
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(tasks) :]:
            axes.set_visible(False)
        names = []
        for axes, (task, (points, line)) in zip(grid.flat, tasks.items(), strict=False):
            _draw_plane(axes, points, line=line, named=named)
            axes.set_title(task, loc="left")
            names += [f"{task}: {point.name}" for point in points]
        figure.supxlabel("tokens per forward", fontsize=9)
        figure.supylabel("accuracy", fontsize=9)
        return _svg(figure, "planes", names)


def _draw_plane(axes: Axes, points: Sequence[Point], *, line: Sequence[int], named: Mapping[str, Look]) -> None:
    steps = [points[i] for i in line]
    axes.plot(
        [point.speed.value for point in steps],
        [point.accuracy.value for point in steps],
        color=GREY,
        linewidth=1.2,
        drawstyle="steps-pre",
        zorder=1,
        label="Pareto line",
    )
    seen: set[str] = set()
    for point in points:
        look = named[point.method]
        x, y = point.speed, point.accuracy
        axes.errorbar(
            x.value,
            y.value,
            xerr=_arms(x),
            yerr=_arms(y),
            color=look.colour,
            elinewidth=0.6,
            alpha=0.35,
            zorder=2,
        )
        (dot,) = axes.plot(
            x.value,
            y.value,
            look.marker,
            color=look.colour,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
            label=point.method if point.method not in seen else None,
        )
        dot.set_gid("point")
        seen.add(point.method)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(alpha=0.25)


def bars(values: Mapping[str, Estimate], *, label: str) -> str:
    """One bar with its interval for every method, the largest on top."""
    order = sorted(values, key=lambda name: values[name].value)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 0.9 + 0.24 * len(order)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(order):
            value = values[name]
            axes.barh(place, value.value, color=COLOURS[5], height=0.7)
            axes.errorbar(value.value, place, xerr=_arms(value), color="black", elinewidth=0.8, capsize=2)
            axes.annotate(
                f"{value.value:.0f}", (value.high, place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.margins(x=0.08)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25)
        return _svg(figure, "bars")


def curves(
    lines: Mapping[str, Sequence[Estimate]], *, named: Mapping[str, Look], x: str, y: str, first: int, most: int
) -> str:
    """Numbers of some variants by place, with their intervals.

    Args:
        lines: of each variant the numbers.
        named: the look of every variant.
        x: what the places are.
        y: what the numbers are.
        first: the first place.
        most: places that are shown.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, values in lines.items():
            look, shown = named[name], list(values[:most])
            places = range(first, first + len(shown))
            low, high = [each.low for each in shown], [each.high for each in shown]
            axes.fill_between(places, low, high, color=look.colour, alpha=0.12, linewidth=0)
            axes.plot(
                places,
                [each.value for each in shown],
                color=look.colour,
                linestyle=look.line,
                marker=look.marker,
                markersize=3.5,
                linewidth=1.3,
                label=name,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=x, ylabel=y)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        return _svg(figure, f"curves {y}")


def calibrations(found: Mapping[str, Calibration], *, named: Mapping[str, Look]) -> str:
    """Scores against the share of right answers, a small picture for every variant."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.5 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        for axes, (name, each) in zip(grid.flat, found.items(), strict=False):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
            for one in each.bins:
                axes.errorbar(
                    one.score,
                    one.right.value,
                    yerr=_arms(one.right),
                    fmt=named[name].marker,
                    color=named[name].colour,
                    markersize=4,
                    elinewidth=0.8,
                )
            axes.set_title(name, fontsize=8, loc="left")
            axes.text(0.97, 0.05, f"error {each.error:.2f}", ha="right", fontsize=8, transform=axes.transAxes)
            axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
            axes.grid(alpha=0.25)
        figure.supxlabel("product of the confidences of an answer's tokens", fontsize=9)
        figure.supylabel("share of right answers", fontsize=9)
        return _svg(figure, "calibrations")


def shares(found: Mapping[str, Mapping[str, float]]) -> str:
    """What the forwards of every variant commit, as shares of all; their number stands beside."""
    names = list(found)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.1 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(names)
        for kind, colour in KIND_COLOURS.items():
            widths = [found[name][kind] / sum(found[name].values()) for name in names]
            axes.barh(range(len(names)), widths, left=left, color=colour, height=0.75, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, name in enumerate(names):
            axes.annotate(f"{sum(found[name].values()):.1f}", (1.01, place), va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6), xlabel="share of the forwards; forwards per sample")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS))
        return _svg(figure, "shares")


def _arms(estimate: Estimate) -> list[list[float]]:
    """An interval as Matplotlib wants it; the number may be on its edge, or by rounding beyond."""
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _svg(figure: Figure, salt: str, titles: Sequence[str] = ()) -> str:
    """The figure as an element of a page; its points get titles, which browsers show under the pointer."""
    text = io.StringIO()
    # Ids are unique in a page by the salt; the figure holds no date, so the same results give the same report.
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    points = [group for group in root.iter(f"{{{SVG}}}g") if group.get("id") == "point"]
    for group, told in zip(points, titles, strict=False):
        del group.attrib["id"]
        title: Any = ElementTree.Element(f"{{{SVG}}}title")
        title.text = told
        group.insert(0, title)
    for name in ("width", "height"):  # the page scales it
        root.attrib.pop(name)
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")
