"""The fit of a filter: what it learns, when it stops, and that only the seed and the records decide it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllm_jax.checkpoints.filters import load_filter, save_filter, to_arrays
from dllm_jax.checkpoints.store import TrainingCheckpoints
from dllm_jax.errors import UsageError
from dllm_jax.models.filter import FilterConfig
from dllm_jax.training.filter import fit as fitting
from dllm_jax.training.filter.config import (
    FilterNetworkSettings,
    FitSettings,
    validate_filter_network,
    validate_fit,
)
from dllm_jax.training.filter.fit import Fitted, Fitter
from dllm_jax.training.filter.records import Records, split
from dllm_jax.training.report import Reporter
from dllm_jax.training.run import RunFolder
from dllm_jax.training.settings import TrainingOutput
from tests.training.filter.synthetic import synthetic

NETWORK = FilterConfig(block_length=8, width=16)
SETTINGS = FitSettings(epochs=55, learning_rate=0.01, eval_every=10, checkpoint_every=20, seed=1)
PARTS = split(synthetic(prompts=20, steps=40), seed=0)
# A few records learnt by heart: the loss of the others soon rises.
OVERFIT: dict[str, Any] = {
    "training": PARTS.training.take(np.arange(12)),
    "epochs": 2000,
    "learning_rate": 0.05,
    "patience": 30,
    "checkpoint_every": 1000,
}
Fit = Callable[..., Fitted]


@pytest.fixture(scope="module", autouse=True)
def one_fitter_for_equal_settings() -> Iterator[None]:
    """Fits with the same settings share their compiled program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Fitter", functools.cache(Fitter))
        yield


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Call it with settings that differ from SETTINGS: fits in the folder tmp_path / "NAME.training"."""

    def start(name: str = "out", training: Records = PARTS.training, **settings: Any) -> Fitted:
        run = RunFolder(TrainingOutput(path=str(tmp_path / name)))
        run.open(settings)
        return fitting.fit(
            training, PARTS.validation, network=NETWORK, settings=dataclasses.replace(SETTINGS, **settings), run=run
        )

    return start


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call it with the number of measurements after which the machine fails; None for never."""
    write = Reporter.write

    def set_limit(limit: int | None) -> None:
        seen = set()

        def limited(self: Reporter, step: int, values: Any, **options: Any) -> None:
            seen.add(step)
            if limit is not None and len(seen) > limit:
                raise RuntimeError("power cut")
            write(self, step, values, **options)

        monkeypatch.setattr(Reporter, "write", limited)

    return set_limit


def weights(fitted: Fitted) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in to_arrays(fitted.filter.params).items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def entropy(share: float) -> float:
    return float(-share * np.log(share) - (1 - share) * np.log(1 - share))


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_it_beats_the_base_rate(fit: Fit, positions: str) -> None:
    fitted = fit(epochs=600, checkpoint_every=300, positions=positions)
    counted = PARTS.validation.masked_RQ | (positions == "all")
    base = entropy(PARTS.validation.correct_RQ[counted].mean())
    best = min(fitted.history, key=lambda measured: measured.validation_loss)
    assert best.validation_loss < 0.6 * base
    assert fitted.best_epoch == best.epoch


def test_committed_positions_teach_nothing_if_only_masked_ones_count(fit: Fit) -> None:
    other = PARTS.training._replace(correct_RQ=PARTS.training.correct_RQ ^ ~PARTS.training.masked_RQ)
    masked = [weights(fit(f"masked{i}", records, positions="masked")) for i, records in enumerate((PARTS[0], other))]
    every = [weights(fit(f"all{i}", records)) for i, records in enumerate((PARTS[0], other))]
    assert masked[0] == masked[1]
    assert every[0] != every[1]


def test_the_seed_decides_everything(fit: Fit) -> None:
    first = fit("first")
    again, other = fit("again"), fit("other", seed=2)
    assert weights(again) == weights(first)
    assert again.history == first.history
    assert weights(other) != weights(first)


def test_it_reports_every_measurement(fit: Fit, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    history = fit().history
    assert [measured.epoch for measured in history] == [10, 20, 30, 40, 50, 55]
    folder = tmp_path / "out.training"
    expected = [
        {"step": measured.epoch, "group": group, "loss": loss}
        for measured in history
        for group, loss in (("train", measured.training_loss), ("held_out", measured.validation_loss))
    ]
    assert lines(folder) == expected
    assert list((folder / "tensorboard").iterdir())
    told = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert told == [f"step {epoch}/55 {group}" for epoch in (20, 40, 55) for group in ("train", "held_out")]


@pytest.mark.parametrize("measurements", [1, 3, 5])
def test_an_interrupted_fit_ends_with_the_same_bits(
    fit: Fit, stop_after: Callable[[int | None], None], tmp_path: Path, measurements: int
) -> None:
    whole = fit("whole")
    stop_after(measurements)
    with pytest.raises(RuntimeError, match="power cut"):
        fit()
    stop_after(None)
    resumed = fit()
    assert weights(resumed) == weights(whole)
    assert (resumed.best_epoch, resumed.history) == (whole.best_epoch, whole.history)
    assert lines(tmp_path / "out.training") == lines(tmp_path / "whole.training")


def test_the_best_survives_an_interruption(fit: Fit, stop_after: Callable[[int | None], None]) -> None:
    settings = OVERFIT | {"checkpoint_every": 10}
    whole = fit("whole", **settings)
    stop_after(len(whole.history) - 1)  # behind the best, and behind a checkpoint behind it
    with pytest.raises(RuntimeError, match="power cut"):
        fit(**settings)
    stop_after(1)  # all that is left
    resumed = fit(**settings)
    assert whole.best_epoch < whole.history[-2].epoch
    assert weights(resumed) == weights(whole)
    assert (resumed.best_epoch, resumed.history) == (whole.best_epoch, whole.history)


def test_a_failure_while_a_checkpoint_is_written_changes_nothing(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    save = TrainingCheckpoints.save

    def failing(self: TrainingCheckpoints, step: int, tree: Any, **options: Any) -> None:
        if step == 40:
            raise RuntimeError("power cut")
        save(self, step, tree, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpoints, "save", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            fit()
    assert weights(fit()) == weights(fit("whole"))


def test_a_finished_fit_is_not_repeated(fit: Fit, stop_after: Callable[[int | None], None]) -> None:
    first = fit()
    stop_after(0)
    assert weights(fit()) == weights(first)


def test_it_stops_early_and_returns_the_best(fit: Fit) -> None:
    stopped = fit("stopped", **OVERFIT)
    best = min(stopped.history, key=lambda measured: measured.validation_loss)
    assert stopped.best_epoch == best.epoch
    assert stopped.history[-1].epoch == best.epoch + 30 < 2000
    assert stopped.history[-1].validation_loss > best.validation_loss
    at_best = fit("at best", **OVERFIT | {"epochs": best.epoch})
    assert weights(at_best) == weights(stopped)


def test_a_fit_that_diverges_is_an_error(fit: Fit) -> None:
    with pytest.raises(UsageError, match=r"^fit\.learning_rate: expected one whose loss stays finite, got 1e\+38$"):
        fit(learning_rate=1e38)


def test_the_result_can_be_saved_and_loaded(fit: Fit, tmp_path: Path) -> None:
    fitted = fit()
    folder = tmp_path / "filter"
    folder.mkdir()
    save_filter(folder, fitted.filter.params)
    loaded = load_filter(folder)
    assert loaded.config == NETWORK
    assert {name: array.tobytes() for name, array in to_arrays(loaded.params).items()} == weights(fitted)


def test_records_without_a_masked_position_cannot_be_learnt(fit: Fit) -> None:
    none = PARTS.training._replace(masked_RQ=np.zeros_like(PARTS.training.masked_RQ))
    with pytest.raises(UsageError, match=r"^fit\.positions: expected records with positions to count \(masked\)"):
        fit(training=none, positions="masked")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 0}, "fit.epochs: expected at least 1, got 0"),
        ({"patience": 0}, "fit.patience: expected at least 1, got 0"),
        ({"learning_rate": -1.0}, "fit.learning_rate: expected at least 0, got -1.0"),
        ({"seed": -1}, "fit.seed: expected at least 0, got -1"),
        ({"checkpoint_every": 15}, "fit.checkpoint_every: expected a multiple of fit.eval_every 10, got 15"),
    ],
)
def test_mistakes_in_settings(settings: dict[str, Any], expected: str) -> None:
    validate_fit(FitSettings())
    with pytest.raises(UsageError) as error:
        validate_fit(FitSettings(**settings))
    assert str(error.value) == expected


def test_mistakes_in_the_network() -> None:
    validate_filter_network(FilterNetworkSettings(num_layers=1, width=1))
    with pytest.raises(UsageError, match=r"^network\.num_layers: expected at least 1, got 0$"):
        validate_filter_network(FilterNetworkSettings(num_layers=0))
