"""Pictures of a filter's fit and quality. This module alone needs Matplotlib, the extra `viz`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dllm_jax.training.filter.fit import Measured

DPI = 120
STYLES: Mapping[str, Mapping[str, Any]] = {
    "filter": {"color": "C0", "marker": "o", "label": "filter"},
    "threshold": {"color": "C1", "marker": "s", "label": "confidence threshold"},
}


def plot_fit(path: Path, history: Sequence[Measured], *, best_epoch: int) -> None:
    """Draws the losses over the epochs.

    Args:
        path: the PNG file.
        history: the losses, at least one entry.
        best_epoch: the one whose parameters were kept; marked.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [measured.epoch for measured in history]
    axes.plot(epochs, [measured.training_loss for measured in history], color="C0", label="training")
    axes.plot(epochs, [measured.validation_loss for measured in history], color="C3", label="validation")
    for best in (measured for measured in history if measured.epoch == best_epoch):
        label = f"best: {best.validation_loss:.4f} after {best.epoch} epochs"
        axes.plot([best.epoch], [best.validation_loss], "o", color="C3", label=label)
    axes.set(xlabel="epoch", ylabel="binary cross-entropy (nats)", title="Fit of the filter")
    _finish(axes)
    figure.savefig(path, dpi=DPI, format="png")


def plot_quality(path: Path, quality: Mapping[str, Any]) -> None:
    """Draws calibration, acceptance over tau, and what coverage costs, for the filter and a confidence threshold.

    Args:
        path: the PNG file.
        quality: what `quality.quality` returned.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    calibrated, over_tau, cost = figure.subplots(1, 3)
    calibrated.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="perfect")
    for name, style in STYLES.items():
        bins = [entry for entry in quality[name]["calibration"]["bins"] if entry["count"]]
        acceptances = quality[name]["acceptances"]
        error = quality[name]["calibration"]["expected_error"]
        calibrated.plot(
            _values(bins, "mean_score"),
            _values(bins, "correct_share"),
            **{**style, "label": f"{style['label']}, expected error {error:.3f}"},
        )
        tau, coverage, wrong = (_values(acceptances, key) for key in ("tau", "coverage", "false_positive_rate"))
        over_tau.plot(tau, coverage, **{**style, "label": f"{style['label']}: coverage"})
        over_tau.plot(tau, wrong, **{**style, "label": f"{style['label']}: false positives", "linestyle": "--"})
        cost.plot(wrong, coverage, **style)
    calibrated.set(xlabel="mean score of a bin", ylabel="share of right tokens", title="Calibration")
    over_tau.set(xlabel="tau", ylabel="share", title="Accepted of all (coverage) and of the wrong")
    cost.set(xlabel="false positive rate", ylabel="coverage", title="Coverage at its cost, tau 0.5 to 0.99")
    for axes in (calibrated, over_tau, cost):
        _finish(axes)
    figure.savefig(path, dpi=DPI, format="png")


def _values(entries: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of a key; not a number where there was nothing to divide by."""
    return [float("nan") if entry[key] is None else entry[key] for entry in entries]


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
