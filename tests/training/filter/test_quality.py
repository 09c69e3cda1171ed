"""The numbers about a filter by hand-computed examples, and their pictures."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.checkpoints.filters import Filter, from_arrays
from dllm_jax.training.filter import plots
from dllm_jax.training.filter import quality as module
from dllm_jax.training.filter.fit import Measured
from dllm_jax.training.filter.quality import THRESHOLDS, acceptance, calibration, quality
from dllm_jax.training.filter.records import Records

# Two steps of a block of three; the last position of the first step is committed.
RECORDS = Records(
    confidence_RQ=np.array([[0.95, 0.55, 1.0], [0.90, 0.65, 0.20]], np.float32),
    correct_RQ=np.array([[True, False, True], [False, True, False]]),
    masked_RQ=np.array([[True, True, False], [True, True, True]]),
    prompt_R=np.array([4, 9], np.int32),
    block_R=np.zeros(2, np.int32),
    step_R=np.zeros(2, np.int32),
)
LOGITS = np.array([[3.0, -1.0, 5.0], [2.0, 0.5, -3.0]])  # probabilities 0.95, 0.27, -, 0.88, 0.62, 0.05


@pytest.fixture
def linear() -> Filter:
    """One layer whose logits are LOGITS for the confidences of RECORDS."""
    inputs = np.concatenate([RECORDS.confidence_RQ, np.ones((2, 1))], axis=1)
    solution = np.linalg.lstsq(inputs, LOGITS, rcond=None)[0]
    return from_arrays({"linear1.weight": solution[:3].T, "linear1.bias": solution[3]})


def at(measured: dict[str, Any], tau: float) -> dict[str, Any]:
    return next(entry for entry in measured["acceptances"] if entry["tau"] == tau)


def test_acceptances_by_hand(linear: Filter) -> None:
    measured = quality(linear, RECORDS, positions="all")
    assert (measured["records"], measured["prompts"], measured["masked_positions"]) == (2, 2, 5)
    assert measured["correct_share"] == pytest.approx(2 / 5)
    # The filter accepts 0.95 and 0.62, which are right, and 0.88, which is wrong.
    assert at(measured["filter"], 0.6) == pytest.approx(
        {"tau": 0.6, "false_positive_rate": 1 / 3, "error_rate": 1 / 3, "coverage": 3 / 5, "recall": 1.0}
    )
    assert at(measured["filter"], 0.9) == pytest.approx(
        {"tau": 0.9, "false_positive_rate": 0.0, "error_rate": 0.0, "coverage": 1 / 5, "recall": 1 / 2}
    )
    # The threshold takes 0.95 and, being at least 0.9, the wrong token with 0.9.
    assert at(measured["threshold"], 0.9) == pytest.approx(
        {"tau": 0.9, "false_positive_rate": 1 / 3, "error_rate": 1 / 2, "coverage": 2 / 5, "recall": 1 / 2}
    )
    assert at(measured["threshold"], 0.98) == {
        "tau": 0.98,
        "false_positive_rate": 0.0,
        "error_rate": None,
        "coverage": 0.0,
        "recall": 0.0,
    }
    assert [entry["tau"] for entry in measured["filter"]["acceptances"]] == list(THRESHOLDS)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_the_loss_by_hand(linear: Filter, positions: str) -> None:
    loss_RQ = np.log1p(np.exp(np.where(RECORDS.correct_RQ, -LOGITS, LOGITS)))
    counted = RECORDS.masked_RQ | (positions == "all")
    assert quality(linear, RECORDS, positions=positions)["loss"] == pytest.approx(loss_RQ[counted].mean(), abs=1e-5)


def test_a_filter_accepts_above_tau_only(monkeypatch: pytest.MonkeyPatch, linear: Filter) -> None:
    monkeypatch.setattr(module, "_probability", lambda *_: jnp.full((2, 3), 0.9, jnp.float32))
    measured = quality(linear, RECORDS, positions="all")
    assert at(measured["filter"], 0.9)["coverage"] == 0
    assert at(measured["filter"], 0.85)["coverage"] == 1


def test_shares_of_nothing_are_none() -> None:
    every = np.ones(4, bool)
    assert acceptance(every, every) == {"false_positive_rate": None, "error_rate": 0, "coverage": 1, "recall": 1}
    assert acceptance(~every, ~every) == {"false_positive_rate": 0, "error_rate": None, "coverage": 0, "recall": None}


def test_calibration_by_hand() -> None:
    score_M = np.array([0.0, 0.05, 0.95, 1.0, 0.95, 0.5], np.float32)
    right_M = np.array([False, True, True, True, False, True])
    measured = calibration(score_M, right_M)
    bins = measured["bins"]
    assert [entry["count"] for entry in bins] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert [(entry["low"], entry["high"]) for entry in (bins[0], bins[9])] == [(0.0, 0.1), (0.9, 1.0)]
    assert bins[0]["mean_score"] == pytest.approx(0.025)
    assert bins[0]["correct_share"] == pytest.approx(0.5)
    assert bins[9]["mean_score"] == pytest.approx(2.9 / 3)
    assert bins[9]["correct_share"] == pytest.approx(2 / 3)
    assert (bins[3]["mean_score"], bins[3]["correct_share"]) == (None, None)
    expected = (2 * abs(0.025 - 0.5) + 1 * abs(0.5 - 1) + 3 * abs(2.9 / 3 - 2 / 3)) / 6
    assert measured["expected_error"] == pytest.approx(expected)


def test_pictures(linear: Filter, tmp_path: Path) -> None:
    history = [Measured(10 * i, 1 / i, 1 / i + 0.01 * i) for i in range(1, 20)]
    plots.plot_fit(tmp_path / "fit.png", history, best_epoch=100)
    plots.plot_fit(tmp_path / "other.png", history, best_epoch=50)
    plots.plot_quality(tmp_path / "quality.png", quality(linear, RECORDS, positions="all"))
    for name, panels in (("fit", 1), ("quality", 3)):
        pixels = picture(tmp_path / f"{name}.png")
        for panel in np.array_split(pixels, panels, axis=1):
            assert len(np.unique(panel.reshape(-1, panel.shape[-1]), axis=0)) > 20, name  # curves, not blank paper
    assert not np.array_equal(picture(tmp_path / "fit.png"), picture(tmp_path / "other.png"))


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    return imread(path)
