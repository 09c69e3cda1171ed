"""Every setting of every command: names, defaults, help, and all validation.

The frozen dataclasses here are what the library takes. Experiment files (`configs/*.py`) start from
`to_config_dict(Config())` and change a few fields; `from_config_dict` brings a `ConfigDict` back, checks types and
unknown names, and calls `validate`. This module imports no JAX, so that a command can show help or an error at once.
"""

import dataclasses
import math
from typing import Any, TypeVar, get_type_hints

from ml_collections import ConfigDict

from dllm_jax.errors import UsageError

DREAM_ORDERS = ("entropy", "maskgit_plus", "topk_margin")
POLICIES = ("low_confidence", "random", "threshold", "factor", *DREAM_ORDERS)
CACHES = ("none", "prefix", "dual")
STOPS = ("none",)
T = TypeVar("T")


def setting(default: T, help_text: str, *, choices: tuple[str, ...] = ()) -> T:
    """A dataclass field with its line of --help and, for a string, the values it may take."""
    metadata = {"help": help_text, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which diffusion model, and how it computes."""

    path: str = setting("llada-tiny", "folder of a Hugging Face or converted checkpoint, or the name of a bundled one")
    preset: str = setting("", "random weights of a known shape instead of model.path, for benchmarks (llada_8b, ...)")
    dtype: str = setting(
        "auto", "dtype of weights and activations (auto: float32 on CPU, else bfloat16)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    matmul_precision: str = setting(
        "default", "precision of float32 matrix products; GPUs and TPUs round them unless it is highest",
        choices=("default", "high", "highest"),
    )  # fmt: skip
    eot_token_id: int = setting(-1, "token that ends a turn, besides EoS (-1: config.json's, else the tokenizer's)")
    verify: bool = setting(True, "check a converted checkpoint against its manifest before loading it")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """How text becomes tokens."""

    path: str = setting("", "folder of the tokenizer (default: the model's folder)")
    chat_template: str = setting(
        "auto", "wrap prompts as a chat (auto: if the tokenizer has a template)", choices=("auto", "on", "off")
    )


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """What is decoded."""

    path: str = setting("", "JSONL file of prompts: id + prompt, messages or prompt_ids (default: built-in examples)")
    prompt: str = setting("", "one prompt, instead of input.path")
    on_error: str = setting("fail", "what a bad input line does: stop, or be left out", choices=("fail", "skip"))


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """Where results go."""

    path: str = setting("", "JSONL file of results; metrics go beside it (default: print)")
    trace: bool = setting(False, "keep in every line what a viewer of the decoding needs: prompt, pieces, confidences")
    overwrite: bool = setting(False, "discard the unfinished output of an earlier run with other settings")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How devices are used; a mesh may take fewer than there are."""

    data: int = setting(0, "devices that split the batch (0: as many as are left and divide decode.batch_size)")
    fsdp: int = setting(0, "devices that split the batch and the weights (0: one)")
    tensor: int = setting(0, "devices that split heads, MLP and vocabulary (0: one)")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The decoding itself."""

    policy: str = setting("low_confidence", "which tokens are committed in a step", choices=POLICIES)
    cache: str = setting("none", "which keys and values are kept between steps", choices=CACHES)
    stop: str = setting("none", "when a row ends before its last block", choices=STOPS)
    gen_length: int = setting(96, "tokens to generate")
    block_length: int = setting(32, "tokens decoded together, block after block (0, and Dream's orders: gen_length)")
    steps: int = setting(0, "forwards of the fixed schedules, over all blocks (0: gen_length, one token each)")
    temperature: float = setting(0.0, "temperature of the Gumbel draw; 0 takes the most likely token")
    temperature_affects_order: bool = setting(
        True, "rank positions by the probability of the drawn token (as released), not of the most likely one"
    )
    top_p: float = setting(1.0, "draw among the likeliest tokens that hold this much probability (1: among all)")
    cfg_scale: float = setting(0.0, "classifier-free guidance; above 0 every forward also runs without the prompt")
    logits_eos_inf: bool = setting(False, "never predict EoS")
    confidence_eos_eot_inf: bool = setting(False, "commit EoS and end-of-turn tokens last")
    eps: float = setting(1e-3, "time at which the schedule of Dream's orders ends")
    batch_size: int = setting(8, "prompts decoded together")
    seed: int = setting(0, "seed of every random draw")
    compat: str = setting("none", "reproduce the bugs of the reference code", choices=("none", "reference"))


@dataclasses.dataclass(frozen=True)
class ThresholdSettings:
    """The policy `threshold` (Fast-dLLM)."""

    value: float = setting(0.9, "commit every position at least this confident, and always the most confident one")


@dataclasses.dataclass(frozen=True)
class FactorSettings:
    """The policy `factor` (Fast-dLLM)."""

    value: float = setting(1.0, "commit the n most confident positions while (n + 1) * (1 - confidence) <= this")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What `decode.bench` measures, and how long."""

    batch_sizes: str = setting("1,8", "batch sizes to measure, separated by commas (instead of decode.batch_size)")
    prompt_length: int = setting(64, "tokens of the prompts; the canvas adds decode.gen_length and some padding")
    steps: int = setting(32, "steps in the loop that a step is timed in")
    repeats: int = setting(5, "measurements of everything, after one for warming up; the median counts")


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
    bench: BenchSettings = dataclasses.field(default_factory=BenchSettings)


def to_config_dict(config: Config) -> ConfigDict:
    """The settings as a `ConfigDict`, for experiment files and flags."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: ConfigDict) -> Config:
    """The settings of a `ConfigDict`, checked.

    Raises:
        UsageError: an unknown field, a value of the wrong type, or a value `validate` refuses.
    """
    config = _build(Config, values, "")
    validate(config)
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
            given[name] = _typed(value, expected, field)
    return cls(**given)


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
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        for field in dataclasses.fields(settings):
            choices, value = field.metadata["choices"], getattr(settings, field.name)
            if choices and value not in choices:
                raise UsageError(f"{section.name}.{field.name}: expected one of {', '.join(choices)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{section.name}.{field.name}: expected a finite number, got {value}")
    if config.input.path and config.input.prompt:
        raise UsageError("input.prompt: expected none together with input.path, got both")
    for name in MeshSettings.__dataclass_fields__:
        _at_least(f"mesh.{name}", getattr(config.mesh, name), 0)
    _validate_decode(config.decode)
    _at_least("threshold.value", config.threshold.value, 0)
    _at_least("factor.value", config.factor.value, 0)
    for name in ("prompt_length", "steps", "repeats"):
        _at_least(f"bench.{name}", getattr(config.bench, name), 1)
    batch_sizes(config.bench)


def _validate_decode(decode: DecodeSettings) -> None:
    _at_least("decode.gen_length", decode.gen_length, 1)
    _at_least("decode.block_length", decode.block_length, 0)
    _at_least("decode.steps", decode.steps, 0)
    _at_least("decode.batch_size", decode.batch_size, 1)
    _at_least("decode.temperature", decode.temperature, 0)
    _at_least("decode.cfg_scale", decode.cfg_scale, 0)
    if not 0 < decode.top_p <= 1:
        raise UsageError(f"decode.top_p: expected above 0 and at most 1, got {decode.top_p}")
    if not 0 < decode.eps < 1:
        raise UsageError(f"decode.eps: expected above 0 and below 1, got {decode.eps}")
    if decode.confidence_eos_eot_inf and decode.policy in DREAM_ORDERS:
        raise UsageError(f"decode.confidence_eos_eot_inf: expected False with decode.policy {decode.policy}, got True")
    block_length, steps = block_schedule(decode)
    if decode.gen_length % block_length:
        raise UsageError(
            f"decode.block_length: expected a divisor of decode.gen_length {decode.gen_length}, got {block_length}"
        )
    blocks = decode.gen_length // block_length
    if steps % blocks:
        raise UsageError(f"decode.steps: expected a multiple of the number of blocks {blocks}, got {steps}")


def block_schedule(decode: DecodeSettings) -> tuple[int, int]:
    """Block length and total steps with their zeros filled in; Dream's orders know one block only."""
    whole = not decode.block_length or decode.policy in DREAM_ORDERS
    return decode.gen_length if whole else decode.block_length, decode.steps or decode.gen_length


def batch_sizes(bench: BenchSettings) -> tuple[int, ...]:
    """The numbers in bench.batch_sizes.

    Raises:
        UsageError: one of them is no positive number.
    """
    sizes = [size.strip() for size in bench.batch_sizes.split(",")]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"bench.batch_sizes: expected positive numbers like 1,8, got {bench.batch_sizes!r}")
    return tuple(map(int, sizes))


def _at_least(field: str, value: float, bound: float) -> None:
    if value < bound:
        raise UsageError(f"{field}: expected at least {bound}, got {value}")
