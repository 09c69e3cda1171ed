"""All settings of a decode: put together, read from a `ConfigDict`, checked.

The frozen dataclasses of `settings/` are what the library takes. Experiment files (`configs/*.py`) start from
`to_config_dict(Config())` and change a few fields; `from_config_dict` brings a `ConfigDict` back, checks types and
unknown names, and calls `validate`. This module imports no JAX, so that a command can show help or an error at once.
"""

import dataclasses
import os
from typing import Any, Protocol, TypeVar, get_type_hints

from ml_collections import ConfigDict

from dllm_jax.errors import UsageError
from dllm_jax.settings import (
    AdaptiveSettings,
    ApdSettings,
    BenchSettings,
    CladSettings,
    CreditSettings,
    DawnSettings,
    DecodeSettings,
    DicoSettings,
    DistributedSettings,
    DynamicSettings,
    EbSettings,
    EditSettings,
    EntropyThresholdSettings,
    EotSettings,
    EvalSettings,
    FactorSettings,
    FilterSettings,
    FrechetSettings,
    HierarchySettings,
    InputSettings,
    KlassSettings,
    Learn2pdSettings,
    LocalLeapSettings,
    MeshSettings,
    ModelSettings,
    OutputSettings,
    PipelinedSettings,
    PlanSettings,
    R2Settings,
    SettledSettings,
    SlidingSettings,
    ThresholdSettings,
    TokenizerSettings,
    VerifierSettings,
    WinoSettings,
    check_fields,
)

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


class Settings(Protocol):
    """All settings of one command: a frozen dataclass whose fields are sections."""

    def validate(self) -> None:
        """Checks values and their combinations; raises `UsageError`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    input: InputSettings = dataclasses.field(default_factory=InputSettings)
    output: OutputSettings = dataclasses.field(default_factory=OutputSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    decode: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    threshold: ThresholdSettings = dataclasses.field(default_factory=ThresholdSettings)
    factor: FactorSettings = dataclasses.field(default_factory=FactorSettings)
    verifier: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    apd: ApdSettings = dataclasses.field(default_factory=ApdSettings)
    filter: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    learn2pd: Learn2pdSettings = dataclasses.field(default_factory=Learn2pdSettings)
    dico: DicoSettings = dataclasses.field(default_factory=DicoSettings)
    frechet: FrechetSettings = dataclasses.field(default_factory=FrechetSettings)
    klass: KlassSettings = dataclasses.field(default_factory=KlassSettings)
    local_leap: LocalLeapSettings = dataclasses.field(default_factory=LocalLeapSettings)
    dawn: DawnSettings = dataclasses.field(default_factory=DawnSettings)
    clad: CladSettings = dataclasses.field(default_factory=CladSettings)
    r2: R2Settings = dataclasses.field(default_factory=R2Settings)
    hierarchy: HierarchySettings = dataclasses.field(default_factory=HierarchySettings)
    credit: CreditSettings = dataclasses.field(default_factory=CreditSettings)
    eb: EbSettings = dataclasses.field(default_factory=EbSettings)
    entropy_threshold: EntropyThresholdSettings = dataclasses.field(default_factory=EntropyThresholdSettings)
    wino: WinoSettings = dataclasses.field(default_factory=WinoSettings)
    dynamic: DynamicSettings = dataclasses.field(default_factory=DynamicSettings)
    edit: EditSettings = dataclasses.field(default_factory=EditSettings)
    sliding: SlidingSettings = dataclasses.field(default_factory=SlidingSettings)
    adaptive: AdaptiveSettings = dataclasses.field(default_factory=AdaptiveSettings)
    pipelined: PipelinedSettings = dataclasses.field(default_factory=PipelinedSettings)
    eot: EotSettings = dataclasses.field(default_factory=EotSettings)
    settled: SettledSettings = dataclasses.field(default_factory=SettledSettings)
    eval: EvalSettings = dataclasses.field(default_factory=EvalSettings)
    distributed: DistributedSettings = dataclasses.field(default_factory=DistributedSettings)
    bench: BenchSettings = dataclasses.field(default_factory=BenchSettings)
    plan: PlanSettings = dataclasses.field(default_factory=PlanSettings)

    def validate(self) -> None:
        """See the function `validate`."""
        validate(self)


def to_config_dict(config: Any) -> ConfigDict:
    """The settings as a `ConfigDict`, for experiment files and flags."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: ConfigDict) -> Config:
    """The settings of a `ConfigDict`, checked.

    Raises:
        UsageError: an unknown field, a value of the wrong type, or a value `validate` refuses.
    """
    return build(Config, values)


def build(schema: type[S], values: ConfigDict) -> S:
    """The settings of a command as its own dataclass of sections, checked; see `from_config_dict`."""
    config = _build(schema, values, "")
    config.validate()
    return config


def read_section(cls: type[T], values: ConfigDict, name: str) -> T:
    """One section of the settings, of which only types and names are checked; see `from_config_dict`."""
    if not isinstance(values[name], ConfigDict):
        raise UsageError(f"{name}: expected a section of settings, got {values[name]!r}")
    return _build(cls, values[name], f"{name}.")


def _build(cls: type[T], values: ConfigDict, prefix: str) -> T:
    """A settings dataclass from the section of the same name."""
    types = get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        known = ", ".join(prefix + name for name in types)
        raise UsageError(f"config field {prefix}{unknown[0]}: expected one of {known}, got an unknown field")
    given = {}
    for name, value in values.items():
        expected, field = types[name], prefix + name
        if isinstance(expected, type) and dataclasses.is_dataclass(expected):
            if not isinstance(value, ConfigDict):
                raise UsageError(f"{field}: expected a section of settings, got {value!r}")
            given[name] = _build(expected, value, field + ".")
        else:
            typed = _typed(value, expected, field)
            given[name] = os.path.expanduser(typed) if _is_path(name) else typed
    return cls(**given)


def _is_path(name: str) -> bool:
    """Whether a setting is a file or folder, by its name: in these `~` is the home folder."""
    return name in ("path", "view", "adapter") or name.endswith("_path")


def _typed(value: Any, expected: type, field: str) -> Any:
    """The value, if it has the field's type (an int is a fine float; a bool is no int)."""
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not expected:
        raise UsageError(f"{field}: expected {expected.__name__}, got {value!r}")
    return value


def validate(config: Config) -> None:
    """Checks values and their combinations, without looking at files or devices.

    Raises:
        UsageError: naming the field, what was expected and what came.
    """
    check_values(config)
    for section in dataclasses.fields(config):
        getattr(config, section.name).check(section.name, config)


def check_values(config: Any) -> None:
    """Checks every setting of a command on its own.

    Raises:
        UsageError: naming the field.
    """
    for section in dataclasses.fields(config):
        check_fields(section.name, getattr(config, section.name))
