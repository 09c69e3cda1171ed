"""The settings that concern every decode: model, input, output, devices, the decoding as a whole, benchmarks."""

import dataclasses
import json
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.settings.base import Section, numbers, setting
from dllm_jax.settings.combinations import (
    BLOCK_STOPS,
    BLOCKS,
    CACHES,
    DREAM_ORDERS,
    OF_BLOCKS,
    POLICIES,
    STOPS,
    check_combination,
)


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section):
    """Which diffusion model, and how it computes."""

    path: str = setting("llada-tiny", "folder of a Hugging Face or converted checkpoint, or the name of a bundled one")
    adapter: str = setting("", "folder of a LoRA adapter in PEFT's layout, merged into the weights as they are loaded")
    preset: str = setting("", "random weights of a known shape instead of model.path, for benchmarks (llada_8b, ...)")
    dtype: str = setting(
        "auto",
        "dtype of weights and activations (auto: float32 on CPU, else bfloat16)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "",
        "weights of matrices in fewer bits: int8 (one scale per output channel); empty: as they are stored",
        choices=("", "int8"),
    )
    matmul_precision: str = setting(
        "default",
        "precision of float32 matrix products; GPUs and TPUs round them unless it is highest",
        choices=("default", "high", "highest"),
    )
    eot_token_id: int = setting(-1, "token that ends a turn, besides EoS (-1: config.json's, else the tokenizer's)")
    verify: bool = setting(True, "check a converted checkpoint against its manifest before loading it")

    def check(self, name: str, config: Any) -> None:
        """Random weights have no adapter."""
        if self.adapter and self.preset:
            raise UsageError(f"{name}.adapter: expected none with {name}.preset {self.preset}, got {self.adapter!r}")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings(Section):
    """How text becomes tokens."""

    path: str = setting("", "folder of the tokenizer (default: the model's folder)")
    chat_template: str = setting(
        "auto", "wrap prompts as a chat (auto: if the tokenizer has a template)", choices=("auto", "on", "off")
    )
    special_text: str = setting(
        "text",
        "what the text of a special token, such as <|eot_id|>, is inside a prompt: text, or (allow) the token",
        choices=("text", "allow"),
    )


@dataclasses.dataclass(frozen=True)
class InputSettings(Section):
    """What is decoded."""

    path: str = setting(
        "",
        "JSONL file of prompts, or a URL: id + prompt, messages or prompt_ids (default: built-in examples); also .gz, "
        "and lines of ShareGPT, alpaca, GSM8K, MATH, HumanEval, MBPP and lm-eval logs",
        filled=True,
    )
    prompt: str = setting("", "one prompt, instead of input.path", filled=True)
    task: str = setting(
        "", "decode.eval: the task of lines that do not name theirs (empty: GSM8K, ... are told by their fields)"
    )
    on_error: str = setting(
        "fail",
        "what a bad input line does: stop, or be left out (listed in output.path + .errors.jsonl)",
        choices=("fail", "skip"),
    )

    def check(self, name: str, config: Any) -> None:
        """A prompt comes from one place."""
        if self.path and self.prompt:
            raise UsageError(f"{name}.prompt: expected none together with {name}.path, got both")


@dataclasses.dataclass(frozen=True)
class OutputSettings(Section):
    """Where results go."""

    path: str = setting(
        "", "JSONL file of results, or a URL of one (gs://, s3://); metrics go beside it (default: print)"
    )
    shard_lines: int = setting(
        0,
        "lines of a file, as in NAME-00000-of-00010.jsonl, each finished before the next begins (0: one file)",
        least=0,
    )
    shards: str = setting(
        "leave",
        "what happens with these files at the end: left, or merged into output.path",
        choices=("leave", "merge"),
    )
    spool: str = setting(
        "~/.cache/dllm_jax/outputs", "folder on this machine where an output grows that is a URL", filled=True
    )
    stop: str = setting(
        "", 'texts end before this string, or before the first of several: ["\\n\\n", "Question:"], a list in JSON'
    )
    trace: bool = setting(
        False, "keep in every line what decode.view shows: prompt, pieces, confidences, proposals of every forward"
    )
    view: str = setting("", "HTML file that shows the first prompts forward by forward (sets output.trace)")
    overwrite: bool = setting(False, "replace an output, finished or not, of other settings, prompts or weights")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; `check` refuses what is none."""
        if not self.stop.startswith('["'):
            return (self.stop,) if self.stop else ()
        return tuple(json.loads(self.stop))

    def check(self, name: str, config: Any) -> None:
        """Stop strings are strings that are not empty."""
        try:
            stops = self.stops
        except ValueError:
            raise UsageError(f"{name}.stop: expected a text or a list of texts in JSON, got {self.stop!r}") from None
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"{name}.stop: expected texts that are not empty, got {self.stop!r}")


@dataclasses.dataclass(frozen=True)
class MeshSettings(Section):
    """How devices are used; a mesh may take fewer than there are."""

    data: int = setting(0, "devices that split the batch (0: as many as are left and divide it)", least=0)
    fsdp: int = setting(0, "devices that split the batch and, if need be, the weights (0: one)", least=0)
    tensor: int = setting(
        0, "devices that split heads, MLP and vocabulary (0: the fewest that hold the decode)", least=0
    )


@dataclasses.dataclass(frozen=True)
class DecodeSettings(Section):
    """The decoding itself."""

    policy: str = setting("low_confidence", "which tokens are committed in a step", choices=POLICIES)
    cache: str = setting(
        "auto",
        "which keys and values are kept between steps (auto: block for models that are causal by blocks, else none)",
        choices=("auto", *CACHES),
    )
    blocks: str = setting("aligned", "which columns are open to be committed, as the decoding moves on", choices=BLOCKS)
    stop: str = setting("none", "when a row ends before its last block", choices=STOPS)
    gen_length: int = setting(96, "tokens to generate", least=1)
    block_length: int = setting(
        32,
        "tokens decoded together, block after block (0, apd, Dream's orders, a shorter canvas: all; 0 with a model "
        "that is causal by blocks: as in its config.json)",
        least=0,
    )
    sub_block_length: int = setting(
        0, "with such a model, columns of a block that are open at once (0: the whole block; Fast-dLLM v2: 8)", least=0
    )
    sub_block_cache: bool = setting(
        False, "run only these columns, against the rest of their block as it was last run (Fast-dLLM v2)"
    )
    steps: int = setting(0, "forwards of the fixed schedules, over all blocks (0: gen_length, one token each)", least=0)
    temperature: float = setting(0.0, "temperature of the Gumbel draw; 0 takes the most likely token", least=0)
    temperature_affects_order: bool = setting(
        True, "rank positions by the probability of the drawn token (as released), not of the most likely one"
    )
    top_p: float = setting(
        1.0, "draw among the likeliest tokens that hold this much probability (1: among all)", above=0, most=1
    )
    top_k: int = setting(0, "draw among so many likeliest tokens (0: among all)", least=0)
    cfg_scale: float = setting(
        0.0, "classifier-free guidance; above 0 every forward also runs without the prompt", least=0
    )
    logits_eos_inf: bool = setting(False, "never predict EoS")
    confidence_eos_eot_inf: bool = setting(False, "commit EoS and end-of-turn tokens last")
    eps: float = setting(1e-3, "time at which the schedule of Dream's orders ends", above=0, below=1)
    batch_size: int = setting(8, "prompts decoded together", least=1)
    refill: float = setting(
        -1.0,
        "share of a batch's rows to be done before the next prompts take their slots (0: a batch runs to its last row; "
        "-1: a quarter without a cache, else 0)",
        least=-1,
        most=1,
    )
    bucket_waste: float = setting(
        0.125,
        "share by which a canvas (prompt and generation) may be padded, for fewer compiled programs (0: no more than "
        "the device's multiple of columns needs)",
        least=0,
    )
    seed: int = setting(0, "seed of every random draw")
    compat: str = setting("none", "reproduce the bugs of the reference code", choices=("none", "reference"))

    def check(self, name: str, config: Any) -> None:
        """What goes together, and what divides what; training commands have these settings too."""
        cache = "none" if self.cache == "auto" else self.cache
        check_combination(policy=self.policy, cache=cache, blocks=self.blocks, stop=self.stop, compat=self.compat)
        for field in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if "eot" in self.stop and getattr(self, field):
                raise UsageError(f"decode.{field}: expected False with decode.stop {self.stop}, got True")
        if self.confidence_eos_eot_inf and self.policy in DREAM_ORDERS:
            raise UsageError(
                f"decode.confidence_eos_eot_inf: expected False with decode.policy {self.policy}, got True"
            )
        if -1 < self.refill < 0:
            raise UsageError(f"decode.refill: expected 0 to 1, or -1, got {self.refill}")
        if self.sub_block_length and self.policy == "apd":
            raise UsageError(
                f"decode.sub_block_length: expected 0 with decode.policy apd, which goes by no blocks, "
                f"got {self.sub_block_length}"
            )
        if self.sub_block_cache and not (self.sub_block_length and self.cache in ("auto", "block")):
            raise UsageError(
                "decode.sub_block_cache: expected False without decode.sub_block_length and decode.cache block, "
                "got True"
            )
        if not self.is_of_blocks:  # the model is not known yet
            check_schedule(self, hint=" (or decode.cache=block with a model that is causal by blocks)")

    @property
    def is_of_blocks(self) -> bool:
        """Whether these are settings for models that are causal by blocks, whose blocks need not fill a generation."""
        return bool(
            self.policy in OF_BLOCKS or self.cache == "block" or self.stop in BLOCK_STOPS or self.sub_block_length
        )


def check_schedule(decode: DecodeSettings, *, hint: str = "") -> None:
    """Refuses blocks that do not come out even with a generation, and steps that do not with the blocks.

    Args:
        decode: the settings of the decode.
        hint: what else may help, behind what is told of blocks.

    Raises:
        UsageError: naming the setting.
    """
    block_length, steps = block_schedule(decode)
    if decode.gen_length % block_length:
        expected = f"a divisor of decode.gen_length {decode.gen_length}"
        raise UsageError(f"decode.block_length: expected {expected}, got {block_length}{hint}")
    check_steps(decode.gen_length // block_length, steps)


def check_steps(blocks: int, steps: int) -> None:
    """Refuses steps that do not come out even with the blocks.

    Raises:
        UsageError: naming the setting.
    """
    if steps % blocks:
        raise UsageError(f"decode.steps: expected a multiple of the number of blocks {blocks}, got {steps}")


def block_schedule(decode: DecodeSettings) -> tuple[int, int]:
    """Block length and total steps with their zeros filled in; apd and Dream's orders know one block only.

    A canvas that is shorter than a block is one block.
    """
    whole = not decode.block_length or decode.policy in (*DREAM_ORDERS, "apd")
    block_length = decode.gen_length if whole else min(decode.block_length, decode.gen_length)
    return block_length, decode.steps or decode.gen_length


def refill_share(decode: DecodeSettings) -> float:
    """`decode.refill` with its -1 filled in by what measures best: README, Performance."""
    if decode.refill >= 0:
        return decode.refill
    return 0.25 if decode.cache == "none" else 0.0


@dataclasses.dataclass(frozen=True)
class DistributedSettings(Section):
    """The processes that do a job together, one or more on every host; all get the same settings but process_id."""

    coordinator: str = setting("", "HOST:PORT of process 0, where the processes meet (empty: one process)")
    num_processes: int = setting(1, "processes in all, with a coordinator", least=1)
    process_id: int = setting(0, "which one this is, from 0", least=0)
    auto: bool = setting(
        False, "all three are found out (TPU pods, Slurm, Kubernetes, Open MPI: jax.distributed.initialize)"
    )
    start_seconds: int = setting(300, "how long a process waits for the others to come", least=1)
    lost_seconds: int = setting(60, "without a sign of life for so long a process is given up, and all end", least=1)

    def check(self, name: str, config: Any) -> None:
        """The processes can meet: somewhere, every one with a number of its own; or all of that is found out."""
        if self.auto:
            if self.coordinator or (self.num_processes, self.process_id) != (1, 0):
                raise UsageError(
                    f"{name}.auto: expected no coordinator, num_processes and process_id with it, got some"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise UsageError(f"{name}.coordinator: expected HOST:PORT, got {self.coordinator!r}")
        if self.num_processes > 1 and not self.coordinator:
            raise UsageError(f"{name}.coordinator: expected HOST:PORT for {self.num_processes} processes, got none")
        if self.process_id >= self.num_processes:
            raise UsageError(f"{name}.process_id: expected 0 to {self.num_processes - 1}, got {self.process_id}")


@dataclasses.dataclass(frozen=True)
class BenchSettings(Section):
    """What `decode.bench` measures, and how long."""

    batch_sizes: str = setting("1,8", "batch sizes to measure, separated by commas (instead of decode.batch_size)")
    prompt_length: int = setting(
        64, "tokens of the prompts; the canvas adds decode.gen_length and some padding", least=1
    )
    steps: int = setting(32, "steps in the loop that a step is timed in", least=1)
    repeats: int = setting(5, "measurements of everything, after one for warming up; the median counts", least=1)
    eos_logit: float = setting(
        0.0,
        "with model.preset: the logit of EoS at masked positions, about (others: about 0; 0: as random as they are)",
    )

    def check(self, name: str, config: Any) -> None:
        """A logit can be given to random weights only, as long as they are no integers."""
        numbers(f"{name}.batch_sizes", self.batch_sizes)
        if self.eos_logit and (config.model.quantize or not config.model.preset):
            raise UsageError(
                f"{name}.eos_logit: expected 0 without model.preset or with model.quantize, got {self.eos_logit}"
            )


@dataclasses.dataclass(frozen=True)
class PlanSettings(Section):
    """What `decode.plan` compiles, and for what."""

    program: str = setting(
        "",
        "decode, or train for an experiment of train.diffusion (empty: what the experiment is for)",
        choices=("", "decode", "train"),
    )

    topology: str = setting(
        "",
        "TPUs that need not be here, like v5e:2x4 (or v6e, v5p, v4, tpu7x; extra tpu), or a GPU by estimate (h100, "
        "h200, rtx4080); empty: the devices here",
    )
    prompt_length: str = setting("256", "tokens of the prompts, one program each, separated by commas")

    def check(self, name: str, config: Any) -> None:
        """The lengths are numbers."""
        numbers(f"{name}.prompt_length", self.prompt_length)
