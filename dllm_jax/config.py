"""Every setting of every command: names, defaults, help, and all validation.

The frozen dataclasses here are what the library takes. Experiment files (`configs/*.py`) start from
`to_config_dict(Config())` and change a few fields; `from_config_dict` brings a `ConfigDict` back, checks types and
unknown names, and calls `validate`. This module imports no JAX, so that a command can show help or an error at once.
"""

import dataclasses
import math
from typing import Any, Protocol, TypeVar, get_type_hints

from ml_collections import ConfigDict

from dllm_jax.errors import UsageError

DREAM_ORDERS = ("entropy", "maskgit_plus", "topk_margin")
POLICIES = ("low_confidence", "random", "threshold", "factor", *DREAM_ORDERS, "apd", "dico")
CACHES = ("none", "prefix", "dual", "window")
STOPS = ("none",)
T = TypeVar("T")
S = TypeVar("S", bound="Settings")


def setting(default: T, help_text: str, *, choices: tuple[str, ...] = ()) -> T:
    """A dataclass field with its line of --help and, for a string, the values it may take."""
    metadata = {"help": help_text, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


class Settings(Protocol):
    """All settings of one command: a frozen dataclass whose fields are sections."""

    def validate(self) -> None:
        """Checks values and their combinations; raises `UsageError`."""


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

    data: int = setting(0, "devices that split the batch (0: as many as are left and divide it)")
    fsdp: int = setting(0, "devices that split the batch and the weights (0: one)")
    tensor: int = setting(0, "devices that split heads, MLP and vocabulary (0: one)")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The decoding itself."""

    policy: str = setting("low_confidence", "which tokens are committed in a step", choices=POLICIES)
    cache: str = setting("none", "which keys and values are kept between steps", choices=CACHES)
    stop: str = setting("none", "when a row ends before its last block", choices=STOPS)
    gen_length: int = setting(96, "tokens to generate")
    block_length: int = setting(32, "tokens decoded together, block after block (0, apd, Dream's orders: all)")
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
class VerifierSettings:
    """The small causal model that checks the drafts of the policy `apd`."""

    path: str = setting("", "folder of a checkpoint over the tokens of model.path, or the name of a bundled one")


@dataclasses.dataclass(frozen=True)
class ApdSettings:
    """The policy `apd` (adaptive parallel decoding), from left to right."""

    mixture_weight: float = setting(0.7, "share R of the diffusion model in the target, 0 to 1: more accepts more")
    kv_window: int = setting(32, "known tokens W that a step runs again before its masks (0: no cache, all of them)")
    max_lookahead: int = setting(64, "masks M that a step sees and drafts (0: all)")
    target: str = setting(
        "gumbel", "draw the target with the noise of the draft (the paper), or take its likeliest (the released code)",
        choices=("gumbel", "argmax"),
    )  # fmt: skip
    temper_noise: bool = setting(True, "multiply the noise by the temperature once more, as released")
    tokens_per_step: int = setting(0, "the baseline: commit this many tokens per step, without a verifier (0: apd)")


@dataclasses.dataclass(frozen=True)
class DicoSettings:
    """The policy `dico` (divide, conquer, finalize), in every block."""

    num_seeds: int = setting(4, "divide: positions N committed per forward, around which clusters grow")
    max_divide_steps: int = setting(10, "divide: forwards S per round")
    tolerance: int = setting(2, "misses M in a row over which a cluster grows")
    seed_threshold: float = setting(0.3, "divide: the least weighted confidence of a seed and of a cluster's growth")
    low_threshold: float = setting(0.6, "mean confidence at which divide ends and below which conquer does")
    parallel_rule: str = setting("factor", "conquer: what a cluster commits at once", choices=("factor", "fixed"))
    factor: float = setting(1.0, "conquer: the n surest with factor / (1 - confidence) - 1 >= n")
    high_threshold: float = setting(0.95, "conquer: confidence to commit under the fixed rule")
    gate: float = setting(0.8, "share R of a block to decode in rounds of divide and conquer, 0 to 1")
    margin: float = setting(3.0, "finalize: lead over the second logit to commit at")
    finalize_tokens: int = setting(1, "finalize: tokens per forward without a clear one (above 1 masks may be left)")
    alpha: float = setting(0.5, "how fast the least weight grows with the share of the text decoded")
    beta: float = setting(0.05, "least weight at the beginning")
    max_weight: float = setting(1.0, "weight of a block's first mask")
    weighting: str = setting(
        "exponential", "divide: how confidence is weighted from a block's first mask to its end",
        choices=("none", "exponential", "linear", "static"),
    )  # fmt: skip
    seed_method: str = setting("soft_nms", "divide: how seeds keep apart", choices=("soft_nms", "regular_interval"))
    auto_commit: float = setting(0.98, "conquer, finalize: confidence above which a token is always committed")
    growth_ratio: float = setting(0.1, "divide: growth of a cluster's width that is progress")
    patience: int = setting(2, "divide: forwards in a row without progress that end it")
    sigma_divisor: float = setting(3.0, "soft_nms: block_length / this is how far a seed weakens others")


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
    verifier: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    apd: ApdSettings = dataclasses.field(default_factory=ApdSettings)
    dico: DicoSettings = dataclasses.field(default_factory=DicoSettings)
    bench: BenchSettings = dataclasses.field(default_factory=BenchSettings)

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
    for name in ("prompt_length", "steps", "repeats"):
        at_least(f"bench.{name}", getattr(config.bench, name), 1)
    batch_sizes(config.bench)


def check_values(config: Any) -> None:
    """Checks every setting of a command on its own: one of its choices, a finite number.

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


def _validate_decode(decode: DecodeSettings) -> None:
    at_least("decode.gen_length", decode.gen_length, 1)
    at_least("decode.block_length", decode.block_length, 0)
    at_least("decode.steps", decode.steps, 0)
    at_least("decode.batch_size", decode.batch_size, 1)
    at_least("decode.temperature", decode.temperature, 0)
    at_least("decode.cfg_scale", decode.cfg_scale, 0)
    if not 0 < decode.top_p <= 1:
        raise UsageError(f"decode.top_p: expected above 0 and at most 1, got {decode.top_p}")
    if not 0 < decode.eps < 1:
        raise UsageError(f"decode.eps: expected above 0 and below 1, got {decode.eps}")
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
    decode, dico = config.decode, config.dico
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
    if decode.policy == "dico" and decode.compat == "reference" and decode.cache == "dual":
        raise UsageError("decode.compat: expected none with decode.policy dico and decode.cache dual, got 'reference'")


def wants_verifier(config: Config) -> bool:
    """Whether the decoding needs a second, causal model."""
    return config.decode.policy == "apd" and not config.apd.tokens_per_step


def block_schedule(decode: DecodeSettings) -> tuple[int, int]:
    """Block length and total steps with their zeros filled in; apd and Dream's orders know one block only."""
    whole = not decode.block_length or decode.policy in (*DREAM_ORDERS, "apd")
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


def at_least(field: str, value: float, bound: float) -> None:
    """Refuses a setting below its bound."""
    if value < bound:
        raise UsageError(f"{field}: expected at least {bound}, got {value}")
