"""The settings of single policies, blocks, caches and stop rules, a section each."""

import dataclasses
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.settings.base import Section, setting, token_ids


@dataclasses.dataclass(frozen=True)
class ThresholdSettings(Section):
    """The policy `threshold` (Fast-dLLM)."""

    value: float = setting(
        0.9, "commit every position at least this confident, and always the most confident one", least=0
    )
    decay: float = setting(
        0.0, "how far the threshold falls while a block fills: to value * (1 - decay) at its last mask", least=0, most=1
    )


@dataclasses.dataclass(frozen=True)
class FactorSettings(Section):
    """The policy `factor` (Fast-dLLM)."""

    value: float = setting(
        1.0, "commit the n most confident positions while (n + 1) * (1 - confidence) <= this", least=0
    )


@dataclasses.dataclass(frozen=True)
class VerifierSettings(Section):
    """The small causal model that checks the drafts of the policy `apd`."""

    path: str = setting("", "folder of a checkpoint over the tokens of model.path, or the name of a bundled one")


@dataclasses.dataclass(frozen=True)
class ApdSettings(Section):
    """The policy `apd` (adaptive parallel decoding), from left to right."""

    mixture_weight: float = setting(
        0.7, "share R of the diffusion model in the target, 0 to 1: more accepts more", least=0, most=1
    )
    kv_window: int = setting(
        32, "known tokens W that a step runs again before its masks (0: no cache, all of them)", least=0
    )
    max_lookahead: int = setting(64, "masks M that a step sees and drafts (0: all)", least=0)
    target: str = setting(
        "gumbel",
        "draw the target with the noise of the draft (the paper), or take its likeliest (the released code)",
        choices=("gumbel", "argmax"),
    )
    temper_noise: bool = setting(True, "multiply the noise by the temperature once more, as released")
    tokens_per_step: int = setting(
        0, "the baseline: commit this many tokens per step, without a verifier (0: apd)", least=0
    )

    def check(self, name: str, config: Any) -> None:
        """What the draft and the verifier go together with."""
        decode = config.decode
        if decode.policy != "apd":
            return
        for field, off in (("cfg_scale", 0), ("logits_eos_inf", False), ("confidence_eos_eot_inf", False)):
            if getattr(decode, field) != off:
                raise UsageError(f"decode.{field}: expected {off} with decode.policy apd, got {getattr(decode, field)}")
        if self.tokens_per_step and config.verifier.path:
            raise UsageError(f"{name}.tokens_per_step: expected 0 together with verifier.path, got both")
        drafted = self.max_lookahead or decode.gen_length
        if self.tokens_per_step > drafted:
            raise UsageError(
                f"{name}.tokens_per_step: expected at most {drafted} (the tokens drafted), got {self.tokens_per_step}"
            )


@dataclasses.dataclass(frozen=True)
class FilterSettings(Section):
    """The filter of the policy `learn2pd`."""

    path: str = setting(
        "", "a safetensors file, a folder or an Orbax checkpoint with a filter, or the name of a bundled one"
    )


@dataclasses.dataclass(frozen=True)
class Learn2pdSettings(Section):
    """The policy `learn2pd` (Learn2PD)."""

    threshold: float = setting(0.96, "commit what the filter accepts with more than this probability", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class EotSettings(Section):
    """The stop rule `eot` (EoTP)."""

    min_confidence: float = setting(
        0.0, "the least confidence of an end of text that a row is cut behind", least=0, most=1
    )


@dataclasses.dataclass(frozen=True)
class DicoSettings(Section):
    """The policy `dico` (divide, conquer, finalize), in every block."""

    num_seeds: int = setting(4, "divide: positions N committed per forward, around which clusters grow", least=1)
    max_divide_steps: int = setting(10, "divide: forwards S per round", least=0)
    tolerance: int = setting(2, "misses M in a row over which a cluster grows", least=0)
    seed_threshold: float = setting(
        0.3, "divide: the least weighted confidence of a seed and of a cluster's growth", least=0
    )
    low_threshold: float = setting(0.6, "mean confidence at which divide ends and below which conquer does", least=0)
    parallel_rule: str = setting("factor", "conquer: what a cluster commits at once", choices=("factor", "fixed"))
    factor: float = setting(1.0, "conquer: the n surest with factor / (1 - confidence) - 1 >= n", least=0)
    high_threshold: float = setting(0.95, "conquer: confidence to commit under the fixed rule", least=0)
    gate: float = setting(0.8, "share R of a block to decode in rounds of divide and conquer, 0 to 1", least=0, most=1)
    margin: float = setting(3.0, "finalize: lead over the second logit to commit at", least=0)
    finalize_tokens: int = setting(
        1, "finalize: tokens per forward without a clear one (above 1 masks may be left)", least=1
    )
    alpha: float = setting(0.5, "how fast the least weight grows with the share of the text decoded", least=0)
    beta: float = setting(0.05, "least weight at the beginning", above=0)
    max_weight: float = setting(1.0, "weight of a block's first mask", above=0)
    weighting: str = setting(
        "exponential",
        "divide: how confidence is weighted from a block's first mask to its end",
        choices=("none", "exponential", "linear", "static"),
    )
    seed_method: str = setting("soft_nms", "divide: how seeds keep apart", choices=("soft_nms", "regular_interval"))
    auto_commit: float = setting(0.98, "conquer, finalize: confidence above which a token is always committed", least=0)
    growth_ratio: float = setting(0.1, "divide: growth of a cluster's width that is progress", least=0)
    patience: int = setting(2, "divide: forwards in a row without progress that end it", least=1)
    sigma_divisor: float = setting(3.0, "soft_nms: block_length / this is how far a seed weakens others", above=0)


@dataclasses.dataclass(frozen=True)
class FrechetSettings(Section):
    """The policy `frechet` (Fast-dLLM++)."""

    delta: float = setting(0.25, "margin of the bound on the joint probability: the n surest with 1 - r - r_n > this")


@dataclasses.dataclass(frozen=True)
class KlassSettings(Section):
    """The policy `klass` (KLASS)."""

    confidence: float = setting(0.6, "commit positions surer than this, whose distribution has come to rest")
    divergence: float = setting(0.015, "largest divergence from one forward to the next, itself excluded", least=0)
    history: int = setting(2, "forwards in a row that have to stay below it", least=1)


@dataclasses.dataclass(frozen=True)
class LocalLeapSettings(Section):
    """The policy `local_leap` (LocalLeap)."""

    threshold: float = setting(0.9, "commit every position at least this confident", least=0)
    relaxed: float = setting(0.75, "the same near one that is", least=0)
    radius: int = setting(4, "columns that are near", least=0)


@dataclasses.dataclass(frozen=True)
class DawnSettings(Section):
    """The policy `dawn` (DAWN)."""

    threshold: float = setting(0.9, "commit every position at least this confident", least=0)
    relaxed: float = setting(0.7, "the same where a position looks at a column that is surely known", least=0)
    low: float = setting(0.75, "and, of positions that do not look at each other, those at least this sure", least=0)
    edge: float = setting(0.07, "attention from which on a column looks at another", above=0)
    sink: float = setting(0.01, "mean attention above which a column is a sink, that no one looks at", least=0)
    layers: int = setting(4, "last layers whose attention is averaged", least=1)


@dataclasses.dataclass(frozen=True)
class CladSettings(Section):
    """The policy `clad` (CLAD)."""

    threshold: float = setting(0.7, "confidence of the candidates, whose clusters may be in conflict", least=0)
    layers: int = setting(4, "last layers whose attention is averaged", least=1)


@dataclasses.dataclass(frozen=True)
class R2Settings(Section):
    """The policy `r2` (R2-dLLM)."""

    threshold: float = setting(0.9, "commit every position at least this confident", least=0)
    window: int = setting(3, "columns of a window (0: no windows, no runs)", least=0)
    window_mean: float = setting(0.8, "commit the masks of a window with this mean confidence, and heads of runs")
    window_known: int = setting(1, "known columns that a window may have", least=0)
    runs: bool = setting(True, "commit the surest of adjacent positions with the same token")
    patience: int = setting(3, "forwards for which a token has to stand to be committed (0: none is)", least=0)
    stable: float = setting(0.8, "confidence that it needs")
    stable_by: str = setting("last", "which confidence of those forwards", choices=("last", "ave", "max"))


@dataclasses.dataclass(frozen=True)
class HierarchySettings(Section):
    """The policy `hierarchy` (dInfer)."""

    threshold: float = setting(0.9, "commit every position above this confidence", least=0)
    low: float = setting(0.4, "the same for the surest of every run of masks", least=0)


@dataclasses.dataclass(frozen=True)
class CreditSettings(Section):
    """The policy `credit` (CreditDecoding)."""

    threshold: float = setting(0.9, "commit every position at least this confident, its credit included", least=0)
    alpha: float = setting(0.7, "weight of the credit in the logits", least=0)
    gamma: float = setting(0.2, "power of a probability that is added to the credit of its token", least=0)
    beta: float = setting(0.8, "share of the credit that a forward leaves", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class EbSettings(Section):
    """The policy `eb` (EB-Sampler)."""

    gamma: float = setting(
        0.1, "commit the surest positions while their entropies less the largest stay within", least=0
    )


@dataclasses.dataclass(frozen=True)
class EntropyThresholdSettings(Section):
    """The policy `entropy_threshold` (d3LLM)."""

    value: float = setting(0.5, "commit every position of at most this entropy, in nats", least=0)


@dataclasses.dataclass(frozen=True)
class WinoSettings(Section):
    """The policy `wino` (WINO): commits widely, and takes back what does not hold."""

    threshold: float = setting(0.6, "commit every position above this confidence", least=0)
    keep: float = setting(0.9, "take back a token whose probability, without itself in sight, is below", least=0)
    max_accept: int = setting(20, "most tokens committed per forward", least=1)


@dataclasses.dataclass(frozen=True)
class DynamicSettings(Section):
    """The policy `dynamic` (SDAR, LLaDA2.0), for models that are causal by blocks."""

    threshold: float = setting(
        0.95,
        "commit every position above this confidence, if those are the scheduled number at least; else the surest ones "
        "of that number (1: always)",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class EditSettings(Section):
    """The policy `edit` (LLaDA2.1, SGLang's JointThreshold), for models that are causal by blocks."""

    threshold: float = setting(0.95, "commit every position above this confidence, at least min_tokens", least=0)
    editing_threshold: float = setting(
        0.9, "write another token over a committed one, if the model is surer of it than this", least=0
    )
    max_post_steps: int = setting(16, "most forwards of a block that has no masks any more", least=0)
    min_tokens: int = setting(1, "tokens that a forward commits at least, while there are masks", least=1)
    penalty: float = setting(
        0.0, "taken from the logit of the token to the left, in the same block, against repetitions", least=0
    )


@dataclasses.dataclass(frozen=True)
class SlidingSettings(Section):
    """The cache `sliding` (DSB): its slice begins before the open range and may end behind it."""

    margin: int = setting(24, "columns before the open range that a step runs again", least=0)
    suffix: int = setting(0, "columns behind the open range that a step runs", least=0)


@dataclasses.dataclass(frozen=True)
class AdaptiveSettings(Section):
    """The blocks `adaptive` (AdaBlock): a block ends with a delimiter that its first forward is sure of."""

    delimiters: str = setting("", "token ids that may end a block, separated by commas, like those of line breaks")
    threshold: float = setting(0.3, "least confidence in a delimiter; without one a block has decode.block_length")

    def check(self, name: str, config: Any) -> None:
        """There are delimiters."""
        if config.decode.blocks == "adaptive":
            token_ids(f"{name}.delimiters", self.delimiters)


@dataclasses.dataclass(frozen=True)
class PipelinedSettings(Section):
    """The blocks `pipelined` (d3LLM, multi-block): the next block is opened before the last one is full."""

    add: float = setting(0.1, "committed share of the last open block with which the next is opened", least=0, most=1)
    ready: float = setting(
        0.95, "committed share of a block with which the one behind it gets a token in every forward", least=0, most=1
    )


@dataclasses.dataclass(frozen=True)
class SettledSettings(Section):
    """The stop rule `settled` (Prophet, SchED): commit all that is left when the mean margin clears a threshold."""

    early: float = setting(7.5, "threshold of the mean margin (best logit less the second) when nothing is decoded")
    late: float = setting(2.5, "threshold when all is; in between it falls evenly")
