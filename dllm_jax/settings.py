"""The sections of settings: names, defaults, help. `config.py` puts them together and checks them.

This module imports no JAX, so that a command can show help or an error at once.
"""

import dataclasses
from typing import TypeVar

DREAM_ORDERS = ("entropy", "maskgit_plus", "topk_margin")
POLICIES = ("low_confidence", "random", "threshold", "factor", *DREAM_ORDERS, "apd", "learn2pd", "dico")
CACHES = ("none", "prefix", "dual", "window")
STOPS = ("none", "eot")
T = TypeVar("T")


def setting(default: T, help_text: str, *, choices: tuple[str, ...] = (), filled: bool = False) -> T:
    """A dataclass field for a setting.

    Args:
        default: its value if none is given.
        help_text: its line of --help.
        choices: for a string, the values it may take.
        filled: given on the command line it must not be empty: that is a script's unset variable, not a wish for the
            default.
    """
    metadata = {"help": help_text, "choices": choices, "filled": filled}
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
    quantize: str = setting(
        "", "weights of matrices in fewer bits: int8 (one scale per output channel); empty: as they are stored",
        choices=("", "int8"),
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
    special_text: str = setting(
        "text", "what the text of a special token, such as <|eot_id|>, is inside a prompt: text, or (allow) the token",
        choices=("text", "allow"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """What is decoded."""

    path: str = setting(
        "", "JSONL file of prompts: id + prompt, messages or prompt_ids (default: built-in examples); also .gz, and "
        "lines of ShareGPT, alpaca, GSM8K, MATH, HumanEval, MBPP and lm-eval logs", filled=True,
    )  # fmt: skip
    prompt: str = setting("", "one prompt, instead of input.path", filled=True)
    on_error: str = setting("fail", "what a bad input line does: stop, or be left out", choices=("fail", "skip"))


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """Where results go."""

    path: str = setting("", "JSONL file of results; metrics go beside it (default: print)")
    trace: bool = setting(False, "keep in every line what a viewer of the decoding needs: prompt, pieces, confidences")
    overwrite: bool = setting(False, "replace an output, finished or not, of other settings, prompts or weights")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How devices are used; a mesh may take fewer than there are."""

    data: int = setting(0, "devices that split the batch (0: as many as are left and divide it)")
    fsdp: int = setting(0, "devices that split the batch and, if need be, the weights (0: one)")
    tensor: int = setting(0, "devices that split heads, MLP and vocabulary (0: the fewest that hold the decode)")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The decoding itself."""

    policy: str = setting("low_confidence", "which tokens are committed in a step", choices=POLICIES)
    cache: str = setting("none", "which keys and values are kept between steps", choices=CACHES)
    stop: str = setting("none", "when a row ends before its last block", choices=STOPS)
    gen_length: int = setting(96, "tokens to generate")
    block_length: int = setting(
        32, "tokens decoded together, block after block (0, apd, Dream's orders, a shorter canvas: all)"
    )
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
    bucket_waste: float = setting(
        0.125, "share by which a canvas (prompt and generation) may be padded, for fewer compiled programs (0: no more "
        "than the device's multiple of columns needs)",
    )  # fmt: skip
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
class FilterSettings:
    """The filter of the policy `learn2pd`."""

    path: str = setting(
        "", "a safetensors file, a folder or an Orbax checkpoint with a filter, or the name of a bundled one"
    )


@dataclasses.dataclass(frozen=True)
class Learn2pdSettings:
    """The policy `learn2pd` (Learn2PD)."""

    threshold: float = setting(0.96, "commit what the filter accepts with more than this probability")


@dataclasses.dataclass(frozen=True)
class EotSettings:
    """The stop rule `eot` (EoTP)."""

    min_confidence: float = setting(0.0, "the least confidence of an end of text that a row is cut behind")


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
class DistributedSettings:
    """The processes that do a job together, one or more on every host; all get the same settings but process_id."""

    coordinator: str = setting("", "HOST:PORT of process 0, where the processes meet (empty: one process)")
    num_processes: int = setting(1, "processes in all, with a coordinator")
    process_id: int = setting(0, "which one this is, from 0")
    auto: bool = setting(
        False, "all three are found out (TPU pods, Slurm, Kubernetes, Open MPI: jax.distributed.initialize)"
    )
    start_seconds: int = setting(300, "how long a process waits for the others to come")
    lost_seconds: int = setting(60, "without a sign of life for so long a process is given up, and all end")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What `decode.bench` measures, and how long."""

    batch_sizes: str = setting("1,8", "batch sizes to measure, separated by commas (instead of decode.batch_size)")
    prompt_length: int = setting(64, "tokens of the prompts; the canvas adds decode.gen_length and some padding")
    steps: int = setting(32, "steps in the loop that a step is timed in")
    repeats: int = setting(5, "measurements of everything, after one for warming up; the median counts")
    eos_logit: float = setting(
        0.0,
        "with model.preset: the logit of EoS at masked positions, about (others: about 0; 0: as random as they are)",
    )


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What `decode.plan` compiles for."""

    topology: str = setting(
        "",
        "TPUs that need not be here, like v5e:2x4 (or v6e, v5p, v4, tpu7x; extra tpu), or a GPU by estimate (h100, "
        "h200, rtx4080); empty: the devices here",
    )
    prompt_length: str = setting("256", "tokens of the prompts, one program each, separated by commas")
