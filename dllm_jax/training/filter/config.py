"""The settings of `train.filter`. This module imports no JAX, as `dllm_jax/config.py`."""

import dataclasses
from pathlib import Path

from dllm_jax.config import Config, check_values, validate
from dllm_jax.errors import UsageError
from dllm_jax.settings import (
    DecodeSettings,
    DistributedSettings,
    Learn2pdSettings,
    MeshSettings,
    ModelSettings,
    TokenizerSettings,
    at_least,
    setting,
)
from dllm_jax.training.settings import TrainingOutput

POSITIONS = ("all", "masked")
MIN_PROMPTS = 3  # one to learn from, one for validation, one for the test


@dataclasses.dataclass(frozen=True)
class FilterNetworkSettings:
    """The shape of the filter."""

    num_layers: int = setting(2, "linear layers, with ReLU between them")
    width: int = setting(32, "of the layers between; inputs and outputs are the positions of a block")


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The optimisation (AdamW), every epoch one step on all records."""

    epochs: int = setting(5000, "the most epochs")
    learning_rate: float = setting(3e-3, "the same in all epochs")
    weight_decay: float = setting(0.01, "of all parameters")
    patience: int = setting(500, "epochs without a better loss on the validation prompts after which the fit ends")
    eval_every: int = setting(10, "epochs between two measurements; the best measured parameters are kept")
    checkpoint_every: int = setting(500, "epochs between two checkpoints, from which an interrupted run continues")
    positions: str = setting(
        "all",
        "positions of a block that the loss counts: also committed ones (as released), or masked ones only",
        choices=POSITIONS,
    )
    cut_copies: int = setting(
        1,
        "further copies of every record, each cut at a random position as the stop rule eot cuts a block (released: 0)",
    )
    seed: int = setting(0, "seed of the first weights, the division of the prompts and the cuts")


def validate_filter_network(network: FilterNetworkSettings) -> None:
    """Checks the shape of the filter.

    Raises:
        UsageError: naming the field.
    """
    for name in ("num_layers", "width"):
        at_least(f"network.{name}", getattr(network, name), 1)


def validate_fit(fit: FitSettings) -> None:
    """Checks the settings of the optimisation.

    Raises:
        UsageError: naming the field.
    """
    for name in ("epochs", "patience", "eval_every", "checkpoint_every"):
        at_least(f"fit.{name}", getattr(fit, name), 1)
    for name in ("learning_rate", "weight_decay", "cut_copies", "seed"):
        at_least(f"fit.{name}", getattr(fit, name), 0)
    if not fit.learning_rate:
        raise UsageError("fit.learning_rate: expected above 0, got 0.0")
    if fit.checkpoint_every % fit.eval_every:
        raise UsageError(
            f"fit.checkpoint_every: expected a multiple of fit.eval_every {fit.eval_every}, got {fit.checkpoint_every}"
        )


@dataclasses.dataclass(frozen=True)
class FilterDataSettings:
    """The prompts to decode, and those to report on."""

    path: str = setting(
        "", "JSONL file: prompt (or question, messages) + answer (default: built-in tasks)", filled=True
    )
    prompts: int = setting(200, "prompts to collect records of: draws of the built-in tasks, or lines of data.path")
    on_error: str = setting("fail", "what a bad line does: stop, or be left out", choices=("fail", "skip"))
    records_path: str = setting(
        "", "folder of the records, to fit other filters to them later (default: in the folder of the run)"
    )
    eval_path: str = setting(
        "",
        "JSONL file of the prompts to report on (default: the bundled ones, or the test share of data.path)",
        filled=True,
    )
    eval_prompts: int = setting(100, "prompts to report on; 0: no report")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the filter is compared with in the report."""

    thresholds: str = setting("0.8,0.85,0.9,0.95", "values of the policy threshold, separated by commas")
    factor: float = setting(1.0, "value of the policy factor")


def _output_defaults() -> TrainingOutput:
    return TrainingOutput(path="out/filter")


def _decode_defaults() -> DecodeSettings:
    return DecodeSettings(batch_size=32)


@dataclasses.dataclass(frozen=True)
class FilterTraining:
    """All settings of `train.filter`."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    data: FilterDataSettings = dataclasses.field(default_factory=FilterDataSettings)
    decode: DecodeSettings = dataclasses.field(default_factory=_decode_defaults)
    network: FilterNetworkSettings = dataclasses.field(default_factory=FilterNetworkSettings)
    fit: FitSettings = dataclasses.field(default_factory=FitSettings)
    learn2pd: Learn2pdSettings = dataclasses.field(default_factory=Learn2pdSettings)
    report: ReportSettings = dataclasses.field(default_factory=ReportSettings)
    output: TrainingOutput = dataclasses.field(default_factory=_output_defaults)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    distributed: DistributedSettings = dataclasses.field(default_factory=DistributedSettings)

    def validate(self) -> None:
        """Checks values and their combinations.

        Raises:
            UsageError: naming the field, what was expected and what came.
        """
        check_values(self)
        validate(self.decoding())
        for name, wanted in (("policy", "low_confidence"), ("stop", "none"), ("temperature", 0.0)):
            if getattr(self.decode, name) != wanted:
                raise UsageError(
                    f"decode.{name}: expected {wanted}, for answers decoded one by one, "
                    f"got {getattr(self.decode, name)}"
                )
        if self.decode.steps not in (0, self.decode.gen_length):
            raise UsageError(f"decode.steps: expected 0, for answers decoded one by one, got {self.decode.steps}")
        for stop in ("none", "eot"):  # what the report will run
            decode = dataclasses.replace(self.decode, policy="learn2pd", stop=stop)
            validate(dataclasses.replace(self.decoding(), decode=decode))
        validate_filter_network(self.network)
        validate_fit(self.fit)
        at_least("data.prompts", self.data.prompts, MIN_PROMPTS)
        at_least("data.eval_prompts", self.data.eval_prompts, 0)
        at_least("report.factor", self.report.factor, 0)
        report_thresholds(self.report)
        if not self.output.path:
            raise UsageError("output.path: expected the folder to write the filter to, got none")
        target = Path(self.output.path).resolve()
        if self.data.records_path and Path(self.data.records_path).resolve().is_relative_to(target):
            raise UsageError(f"data.records_path: expected a folder outside output.path, got {self.data.records_path}")

    def decoding(self) -> Config:
        """How answers are decoded, one token in every forward."""
        return Config(
            model=self.model, tokenizer=self.tokenizer, mesh=self.mesh, decode=self.decode, learn2pd=self.learn2pd
        )


def report_thresholds(report: ReportSettings) -> tuple[float, ...]:
    """The numbers in report.thresholds.

    Raises:
        UsageError: one of them is no number from 0 to 1.
    """
    try:
        values = tuple(float(value) for value in report.thresholds.split(",") if value.strip())
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 1 for value in values):
        raise UsageError(f"report.thresholds: expected numbers from 0 to 1 like 0.85,0.9, got {report.thresholds!r}")
    return values
