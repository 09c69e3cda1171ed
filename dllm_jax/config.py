"""All settings of a decode: put together, read from a `ConfigDict`, checked.

The frozen dataclasses of `settings.py` are what the library takes. Experiment files (`configs/*.py`) start from
`to_config_dict(Config())` and change a few fields; `from_config_dict` brings a `ConfigDict` back, checks types and
unknown names, and calls `validate`. This module imports no JAX, so that a command can show help or an error at once.
"""

import dataclasses
import math
import os
from typing import Any, Protocol, TypeVar, get_type_hints

from ml_collections import ConfigDict

from dllm_jax.errors import UsageError
from dllm_jax.settings import (
    DREAM_ORDERS,
    ApdSettings,
    BenchSettings,
    DecodeSettings,
    DicoSettings,
    EotSettings,
    FactorSettings,
    FilterSettings,
    InputSettings,
    Learn2pdSettings,
    MeshSettings,
    ModelSettings,
    OutputSettings,
    PlanSettings,
    ThresholdSettings,
    TokenizerSettings,
    VerifierSettings,
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
    eot: EotSettings = dataclasses.field(default_factory=EotSettings)
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
    return name == "path" or name.endswith("_path")


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
    if config.input.path and config.input.prompt:
        raise UsageError("input.prompt: expected none together with input.path, got both")
    for name in MeshSettings.__dataclass_fields__:
        at_least(f"mesh.{name}", getattr(config.mesh, name), 0)
    _validate_decode(config.decode)
    at_least("threshold.value", config.threshold.value, 0)
    at_least("factor.value", config.factor.value, 0)
    _validate_apd(config)
    _validate_dico(config)
    for field, value in (
        ("learn2pd.threshold", config.learn2pd.threshold),
        ("eot.min_confidence", config.eot.min_confidence),
    ):
        if not 0 <= value <= 1:
            raise UsageError(f"{field}: expected 0 to 1, got {value}")
    for name in ("prompt_length", "steps", "repeats"):
        at_least(f"bench.{name}", getattr(config.bench, name), 1)
    numbers("bench.batch_sizes", config.bench.batch_sizes)
    numbers("plan.prompt_length", config.plan.prompt_length)
    if config.bench.eos_logit and (config.model.quantize or not config.model.preset):
        raise UsageError(
            f"bench.eos_logit: expected 0 without model.preset or with model.quantize, got {config.bench.eos_logit}"
        )


def check_values(config: Any) -> None:
    """Checks every setting of a command on its own: one of its choices, a finite number, text, a seed that fits.

    Raises:
        UsageError: naming the field.
    """
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        for field in dataclasses.fields(settings):
            choices, value = field.metadata["choices"], getattr(settings, field.name)
            if choices and value not in choices:
                raise UsageError(f"{section.name}.{field.name}: expected one of {', '.join(choices)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{section.name}.{field.name}: expected a finite number, got {value}")
            if isinstance(value, str) and not is_text(value):  # a byte of the command line that is no UTF-8
                raise UsageError(f"{section.name}.{field.name}: expected UTF-8 text, got {value!r}")
            if field.name == "seed" and not 0 <= value < 2**32:  # further bits would be dropped
                raise UsageError(f"{section.name}.seed: expected 0 to {2**32 - 1}, got {value}")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _validate_decode(decode: DecodeSettings) -> None:
    at_least("decode.gen_length", decode.gen_length, 1)
    at_least("decode.block_length", decode.block_length, 0)
    at_least("decode.steps", decode.steps, 0)
    at_least("decode.batch_size", decode.batch_size, 1)
    at_least("decode.bucket_waste", decode.bucket_waste, 0)
    at_least("decode.temperature", decode.temperature, 0)
    at_least("decode.cfg_scale", decode.cfg_scale, 0)
    if not 0 < decode.top_p <= 1:
        raise UsageError(f"decode.top_p: expected above 0 and at most 1, got {decode.top_p}")
    if not 0 < decode.eps < 1:
        raise UsageError(f"decode.eps: expected above 0 and below 1, got {decode.eps}")
    if decode.compat == "reference" and decode.cache == "dual":  # a bug of Fast-dLLM's loop, which others do not have
        for name, names in (("policy", ("learn2pd", "dico")), ("stop", ("eot",))):
            if (value := getattr(decode, name)) in names:
                raise UsageError(
                    f"decode.compat: expected none with decode.{name} {value} and decode.cache dual, got 'reference'"
                )
    if decode.stop == "eot":
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if getattr(decode, name):
                raise UsageError(f"decode.{name}: expected False with decode.stop eot, got True")
    if decode.confidence_eos_eot_inf and decode.policy in DREAM_ORDERS:
        raise UsageError(f"decode.confidence_eos_eot_inf: expected False with decode.policy {decode.policy}, got True")
    caches = ("none", "window") if decode.policy == "apd" else ("none", "prefix", "dual")
    if decode.cache not in caches:
        raise UsageError(
            f"decode.cache: expected one of {', '.join(caches)} with decode.policy {decode.policy}, "
            f"got {decode.cache!r}"
        )
    block_length, steps = block_schedule(decode)
    if decode.gen_length % block_length:
        raise UsageError(
            f"decode.block_length: expected a divisor of decode.gen_length {decode.gen_length}, got {block_length}"
        )
    blocks = decode.gen_length // block_length
    if steps % blocks:
        raise UsageError(f"decode.steps: expected a multiple of the number of blocks {blocks}, got {steps}")


def _validate_apd(config: Config) -> None:
    decode, apd = config.decode, config.apd
    if not 0 <= apd.mixture_weight <= 1:
        raise UsageError(f"apd.mixture_weight: expected 0 to 1, got {apd.mixture_weight}")
    for name in ("kv_window", "max_lookahead", "tokens_per_step"):
        at_least(f"apd.{name}", getattr(apd, name), 0)
    if decode.policy != "apd":
        return
    for name, off in (("stop", "none"), ("cfg_scale", 0), ("logits_eos_inf", False), ("confidence_eos_eot_inf", False)):
        if getattr(decode, name) != off:
            raise UsageError(f"decode.{name}: expected {off} with decode.policy apd, got {getattr(decode, name)}")
    if apd.tokens_per_step and config.verifier.path:
        raise UsageError("apd.tokens_per_step: expected 0 together with verifier.path, got both")
    if apd.tokens_per_step > (apd.max_lookahead or decode.gen_length):
        raise UsageError(
            f"apd.tokens_per_step: expected at most {apd.max_lookahead or decode.gen_length} (the tokens drafted), "
            f"got {apd.tokens_per_step}"
        )


def _validate_dico(config: Config) -> None:
    dico = config.dico
    for name in ("num_seeds", "finalize_tokens", "patience"):
        at_least(f"dico.{name}", getattr(dico, name), 1)
    for name in (
        "max_divide_steps", "tolerance", "seed_threshold", "low_threshold", "factor", "high_threshold", "margin",
        "alpha", "auto_commit", "growth_ratio",
    ):  # fmt: skip
        at_least(f"dico.{name}", getattr(dico, name), 0)
    for name in ("beta", "max_weight", "sigma_divisor"):
        if getattr(dico, name) <= 0:
            raise UsageError(f"dico.{name}: expected above 0, got {getattr(dico, name)}")
    if not 0 <= dico.gate <= 1:
        raise UsageError(f"dico.gate: expected 0 to 1, got {dico.gate}")


def wants_verifier(config: Config) -> bool:
    """Whether the decoding needs a second, causal model."""
    return config.decode.policy == "apd" and not config.apd.tokens_per_step


def block_schedule(decode: DecodeSettings) -> tuple[int, int]:
    """Block length and total steps with their zeros filled in; apd and Dream's orders know one block only.

    A canvas that is shorter than a block is one block.
    """
    whole = not decode.block_length or decode.policy in (*DREAM_ORDERS, "apd")
    block_length = decode.gen_length if whole else min(decode.block_length, decode.gen_length)
    return block_length, decode.steps or decode.gen_length


def numbers(field: str, text: str) -> tuple[int, ...]:
    """The positive numbers in a setting, separated by commas.

    Raises:
        UsageError: one of them is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{field}: expected positive numbers like 1,8, got {text!r}")
    return tuple(map(int, parts))


def at_least(field: str, value: float, bound: float) -> None:
    """Refuses a setting below its bound."""
    if value < bound:
        raise UsageError(f"{field}: expected at least {bound}, got {value}")
