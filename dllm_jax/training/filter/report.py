"""What a filter buys: decoded answers to held-out prompts, beside those of other policies and of the oracle."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import rich.progress
from rich import box
from rich.table import Table

from dllm_jax.checkpoints.filters import Filter
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.models.model import Model
from dllm_jax.progress import for_people
from dllm_jax.settings import FactorSettings, ThresholdSettings
from dllm_jax.training.filter.collect import replay
from dllm_jax.training.filter.config import ReportSettings, report_thresholds
from dllm_jax.training.held_out import HeldOutPrompts

Row = dict[str, Any]


def compare(
    model: Model,
    filter_: Filter,
    held_out: HeldOutPrompts,
    *,
    config: Config,
    report: ReportSettings,
    end_ids: tuple[int, ...],
) -> list[Row]:
    """Decodes the prompts by every policy.

    Args:
        model: the diffusion model.
        filter_: the filter.
        held_out: the prompts.
        config: of decoding one by one; its policy is replaced.
        report: what to compare with.
        end_ids: the tokens that end a text, EoS first.

    Returns:
        For each policy `policy`, `nfe` per prompt, `agreement` (share of the answers, up to the end of the text, that
        are those of one-by-one decoding), `forwards_per_block`, and what `HeldOutPrompts.measured` says. The last is
        the oracle: the forwards it needs for exactly those answers.
    """
    policies = list(_policies(config, report))
    rows: list[Row] = []
    with rich.progress.Progress(**for_people()) as progress:
        bar = progress.add_task("comparing", total=len(policies) + 1)
        for name, settings in policies:
            decoder = Decoder(model, settings, filter=filter_, end_ids=end_ids)
            result = decode_all(decoder, held_out.tokens)
            if not rows:
                baseline, baseline_decoder = result, decoder
            blocks = -(-result.end_B // decoder.block_length)
            rows.append(_row(name, result, baseline, blocks=int(blocks.sum())) | held_out.measured(result))
            progress.advance(bar)
        rows.append(_oracle(baseline_decoder, baseline, held_out))
        progress.advance(bar)
    return rows


def table(rows: list[Row]) -> Table:
    """The rows for a reader."""
    shown = Table("Policy", box=box.SIMPLE_HEAD)
    titles = {
        "accuracy": "Accuracy",
        "agreement": "As one by one",
        "tokens_per_forward": "TPF",
        "nfe": "NFE",
        "forwards_per_block": "Forwards per block",
    }
    for title in titles.values():
        shown.add_column(title, justify="right")
    for row in rows:
        digits = {"accuracy": 3, "agreement": 3, "nfe": 1}
        shown.add_row(
            row["policy"], *(f"{row[name]:.{digits.get(name, 2)}f}" if name in row else "" for name in titles)
        )
    return shown


def _policies(config: Config, report: ReportSettings) -> Iterator[tuple[str, Config]]:
    """Names and settings; the baseline comes first."""

    def settings(policy: str, *, stop: str = "none", **sections: Any) -> Config:
        decode = dataclasses.replace(config.decode, policy=policy, stop=stop)
        return dataclasses.replace(config, decode=decode, **sections)

    yield "low_confidence", settings("low_confidence")
    for value in report_thresholds(report):
        yield f"threshold {value}", settings("threshold", threshold=ThresholdSettings(value))
    yield f"factor {report.factor}", settings("factor", factor=FactorSettings(report.factor))
    yield f"learn2pd {config.learn2pd.threshold}", settings("learn2pd")
    yield f"learn2pd {config.learn2pd.threshold} + eot", settings("learn2pd", stop="eot")


def _row(name: str, result: DecodeResult, baseline: DecodeResult, *, blocks: int) -> Row:
    same = [result.text_ids(i) == baseline.text_ids(i) for i in range(len(result.tokens_BG))]
    return {
        "policy": name,
        "nfe": float(result.nfe_B.mean()),
        "forwards_per_block": float(result.nfe_B.sum()) / blocks,
        "agreement": float(np.mean(same)),
    }


def _oracle(decoder: Decoder, baseline: DecodeResult, held_out: HeldOutPrompts) -> Row:
    """The forwards in which the oracle reproduces the baseline."""
    forwards = 0
    batches = decoder.batches([len(tokens) for tokens in held_out.tokens])
    for batch in batches:
        prompts = [held_out.tokens[i] for i in batch]
        forwards += replay(decoder, prompts, baseline.tokens_BG[batch], rows=batch).size
    count, gen_length = baseline.tokens_BG.shape
    return {
        "policy": "oracle",
        "nfe": forwards / count,
        "forwards_per_block": forwards / (count * gen_length // decoder.block_length),
        "agreement": 1.0,
        "tokens_per_forward": int(baseline.num_tokens_B.sum()) / forwards,
    } | {name: value for name, value in held_out.measured(baseline).items() if name.startswith("accuracy")}
