"""The report on a sweep: from its results to one HTML file that needs nothing else, and the same tables in Markdown."""

import functools
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dllm_jax.errors import UsageError
from dllm_jax.evals import anatomy, statistics
from dllm_jax.evals.results import Variant
from dllm_jax.evals.statistics import Estimate, Paired

TEMPLATES = Path(__file__).parent.parent / "assets" / "report"
ALL = "all samples"
SHOWN = 8  # variants in the pictures of what happens inside
EXAMPLES = 12  # samples on which variants differ
MOST_TEXT = 300  # characters of an answer
AUP_RESAMPLES = 400


class Report:
    """All numbers of a report.

    Args:
        variants: finished, from slow to fast.
        baseline: the name of the one that the others are compared with; "": that of most forwards.
        shown: names of those whose inside is shown; none: baseline, Pareto line and the best others.

    Raises:
        UsageError: there is no variant of such a name.
    """

    def __init__(self, variants: Sequence[Variant], *, baseline: str = "", shown: Sequence[str] = ()) -> None:
        self.variants = variants
        self.by_name = {variant.name: variant for variant in variants}
        for field, name in (("--baseline", baseline), *(("--show", name) for name in shown)):
            if name and name not in self.by_name:
                known = ", ".join(self.by_name)
                raise UsageError(f"{field}: expected a variant of the sweep, one of {known}, got {name!r}")
        slowest = max(variants, key=lambda variant: (variant.metrics["nfe_mean"], variant.metrics["accuracy"]))
        self.baseline = self.by_name[baseline or slowest.name]
        self.tasks = list(dict.fromkeys(str(row["task"]) for variant in variants for row in variant.rows))
        self.methods = sorted({variant.method for variant in variants})
        self.points = {task: self._points(task) for task in (ALL, *self.tasks)}
        self.line = [variants[i].name for i in _line(list(self.points[ALL].values()))]
        self.shown = list(shown) or self._worth_a_look()

    def _worth_a_look(self) -> list[str]:
        """Baseline, Pareto line, the most accurate variants of the methods of largest AUP: at most `SHOWN` names."""
        names = [self.baseline.name, *self.line[: SHOWN - 1]]
        for method in sorted(self.methods, key=lambda method: -self.aup[method].value):
            own = [variant for variant in self.variants if variant.method == method]
            best = max(own, key=lambda each: (each.metrics["accuracy"], each.metrics["tokens_per_forward"]))
            names += [best.name] * (not any(self.by_name[name].method == method for name in names))
        return list(dict.fromkeys(names))[:SHOWN]

    def _points(self, task: str) -> dict[str, tuple[Estimate, Estimate]]:
        """Tokens per forward and accuracy of every variant that has samples of the task."""
        points = {}
        for variant in self.variants:
            if (of_task := of(variant, task)).any():
                right, tokens, forwards = (variant.numbers(name)[of_task] for name in NUMBERS)
                points[variant.name] = (
                    statistics.ratio(tokens, forwards),
                    statistics.wilson(right.sum(), len(right)),
                )
        return points

    @functools.cached_property
    def compared(self) -> dict[str, tuple[Paired, float]]:
        """Every variant against the baseline on the samples of both, and its p value adjusted for all of them."""
        found = {}
        there = dict(zip(self.baseline.keys, range(len(self.baseline.rows)), strict=True))
        for variant in self.variants:
            pairs = [(i, there[key]) for i, key in enumerate(variant.keys) if key in there]
            if variant is not self.baseline and pairs:
                here_S, there_S = np.array(pairs).T
                here, other = (
                    tuple(each.numbers(name)[some] for name in NUMBERS)
                    for each, some in ((variant, here_S), (self.baseline, there_S))
                )
                found[variant.name] = statistics.paired(here, other)
        adjusted = statistics.holm([each.p for each in found.values()])
        return {name: (each, p) for (name, each), p in zip(found.items(), adjusted, strict=True)}

    @functools.cached_property
    def aup(self) -> dict[str, Estimate]:
        """Accuracy under parallelism of every method over all samples, with bootstrap intervals."""
        accuracy_RV, speed_RV = (np.stack(each, axis=1) for each in zip(*map(_drawn, self.variants), strict=True))
        found = {}
        for method in self.methods:
            own = [i for i, variant in enumerate(self.variants) if variant.method == method]
            value, *drawn = (
                statistics.aup(speed[own], accuracy[own], best=accuracy.max())
                for speed, accuracy in zip(speed_RV, accuracy_RV, strict=True)
            )
            found[method] = statistics.bootstrap(value, np.array(drawn))
        return found

    @functools.cached_property
    def kinds(self) -> dict[str, dict[str, float]]:
        """Forwards per sample by what they commit."""
        return {variant.name: anatomy.forwards_by_kind(variant.rows) for variant in self.variants}

    @functools.cached_property
    def phases(self) -> dict[str, dict[str, float]]:
        """Forwards per sample by phase, of variants that have phases."""
        return {
            variant.name: {phase: n / len(variant.rows) for phase, n in variant.metrics["forwards_by_phase"].items()}
            for variant in self.variants
            if "forwards_by_phase" in variant.metrics
        }

    @functools.cached_property
    def calibrations(self) -> dict[str, anatomy.Calibration]:
        """Of the shown variants that were traced."""
        found = {name: anatomy.calibration(self.by_name[name].rows) for name in self.shown}
        return {name: each for name, each in found.items() if each}

    @functools.cached_property
    def examples(self) -> list[dict[str, Any]]:
        """Samples on which shown variants differ, those first on which most are wrong: id, task, and every answer."""
        rows = {name: dict(zip(self.by_name[name].keys, self.by_name[name].rows, strict=True)) for name in self.shown}
        common = [key for key in rows[self.shown[0]] if all(key in own for own in rows.values())]
        wrong = {key: sum(not own[key]["correct"] for own in rows.values()) for key in common}
        differing = sorted((key for key in common if 0 < wrong[key] < len(rows)), key=lambda key: -wrong[key])
        return [
            {
                "id": rows[self.shown[0]][key]["id"],
                "task": rows[self.shown[0]][key]["task"],
                "answers": [
                    (name, bool(own[key]["correct"]), own[key]["nfe"], _cut(own[key]["text"]))
                    for name, own in rows.items()
                ],
            }
            for key in differing[:EXAMPLES]
        ]

    @property
    def conditions(self) -> list[tuple[str, str]]:
        """What all of it was measured with; several values where the variants differ."""
        told = {
            "samples": lambda metrics: metrics["num_samples"],
            "device": lambda metrics: "{kind} ({count} of {platform})".format(**metrics["device"]),
            "dtype": lambda metrics: metrics["dtype"],
            "mesh": lambda metrics: ", ".join(f"{axis} {size}" for axis, size in metrics["mesh"].items()),
            "model": lambda metrics: metrics["config"]["model"]["path"] or metrics["config"]["model"]["preset"],
            "batch size": lambda metrics: metrics["config"]["decode"]["batch_size"],
            "tokens generated": lambda metrics: metrics["config"]["decode"]["gen_length"],
            "versions": lambda metrics: ", ".join(f"{name} {v}" for name, v in metrics["versions"].items()),
        }
        return [
            (name, "; ".join(dict.fromkeys(str(tell(variant.metrics)) for variant in self.variants)))
            for name, tell in told.items()
        ]


NUMBERS = ("correct", "num_tokens", "nfe")


def of(variant: Variant, task: str) -> np.ndarray:
    """Which samples of a variant are of a task: [S]."""
    return np.array([task in (ALL, str(row["task"])) for row in variant.rows])


def _line(points: Sequence[tuple[Estimate, Estimate]]) -> list[int]:
    return statistics.pareto([(speed.value, accuracy.value) for speed, accuracy in points])


def _drawn(variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy in percent and tokens per forward, of the samples and then of resamples: [1 + AUP_RESAMPLES] each."""
    right, tokens, forwards = (variant.numbers(name) for name in NUMBERS)
    drawn = np.concatenate([np.ones((1, len(right))), statistics.resamples(len(right))[:AUP_RESAMPLES]])
    return 100 * drawn @ right / len(right), (drawn @ tokens) / (drawn @ forwards)


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " ..."


def pictures(report: Report) -> dict[str, str]:
    """The report's pictures by name, as SVG; those for which the results say nothing are missing."""
    from dllm_jax.evals import plots

    methods, shown = plots.looks(report.methods), plots.looks(report.shown)
    planes = {
        task: [
            plots.Point(name, report.by_name[name].method, speed, accuracy)
            for name, (speed, accuracy) in points.items()
        ]
        for task, points in report.points.items()
    }
    lines = {task: _line(list(points.values())) for task, points in report.points.items()}
    rows = {name: report.by_name[name].rows for name in report.shown}
    found = {
        "plane": plots.plane(planes[ALL], line=lines[ALL], named=methods),
        "planes": plots.planes({task: (planes[task], lines[task]) for task in report.tasks}, named=methods),
        "aup": plots.bars(report.aup, label="accuracy under parallelism"),
        "committed": plots.curves(
            {name: anatomy.committed_per_forward(own) for name, own in rows.items()},
            named=shown,
            x="forward",
            y="tokens of the answer committed",
            first=1,
            most=24,
        ),
        "acceptance": plots.curves(
            {name: anatomy.acceptance(own) for name, own in rows.items()},
            named=shown,
            x="distance from the first masked position",
            y="share committed per forward",
            first=0,
            most=32,
        ),
        "kinds": plots.shares(report.kinds),
    }
    if report.calibrations:
        found["calibration"] = plots.calibrations(report.calibrations, named=shown)
    return found


def as_html(report: Report, drawn: Mapping[str, str], *, title: str, unfinished: Sequence[str]) -> str:
    """The whole report as a page without scripts or links to anything outside it.

    Args:
        report: the numbers.
        drawn: the `pictures`.
        title: of the page.
        unfinished: names of variants that are not in it.
    """
    return _render("report.html.j2", report, title=title, unfinished=unfinished, pictures=drawn)


def as_markdown(report: Report, *, title: str, unfinished: Sequence[str]) -> str:
    """The tables of the report."""
    return _render("report.md.j2", report, title=title, unfinished=unfinished)


def _render(name: str, report: Report, **more: Any) -> str:
    """A template, in which everything but our own pictures is escaped: texts in it come from models."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    if name.endswith(".md.j2"):
        environment.autoescape = False
        environment.finalize = lambda value: _markdown(value) if isinstance(value, str) else value
    environment.filters |= {"interval": _interval, "p": _p, "range": _range}
    return environment.get_template(name).render(report=report, ALL=ALL, **more)


def _markdown(text: str) -> str:
    """Text that means nothing in Markdown, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_{}[]|#~$" else c for c in text)


def _interval(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} ({_range(estimate, digits)})"


def _range(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
