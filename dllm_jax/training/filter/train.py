"""Trains a filter for the policy learn2pd: collects records, fits, compares, exports (Learn2PD, arXiv 2509.25188)."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dllm_jax import hosts
from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.filters import save_filter
from dllm_jax.checkpoints.fingerprint import check_apart
from dllm_jax.data import samples, tasks, text
from dllm_jax.data.outputs import IDENTITY, VERSION
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.decoding.generate import Decoder
from dllm_jax.identity import basis, digest, sources
from dllm_jax.mesh import make_mesh
from dllm_jax.metrics import environment
from dllm_jax.models.filter import FilterConfig
from dllm_jax.opening import open_text_model
from dllm_jax.places import only_writer
from dllm_jax.training.filter.collect import collect
from dllm_jax.training.filter.config import FilterTraining
from dllm_jax.training.filter.fit import Fitted, fit
from dllm_jax.training.filter.plots import plot_fit, plot_quality
from dllm_jax.training.filter.quality import quality
from dllm_jax.training.filter.records import outdated, split, split_prompts
from dllm_jax.training.filter.report import compare
from dllm_jax.training.held_out import HeldOutPrompts
from dllm_jax.training.run import METRICS, RunFolder, opened

RECORDED = ("model", "tokenizer", "decode")  # sections of the settings that decide the records
PATHS = ("path", "eval_path")  # of data: their content counts, not their names


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts and their tokens."""

    prompts: list[Prompt]
    tokens: list[list[int]]

    def part(self, places: Sequence[int]) -> "Questions":
        """Some of them."""
        return Questions([self.prompts[i] for i in places], [self.tokens[i] for i in places])


class Asked(NamedTuple):
    """Prompts before there is a tokenizer for them."""

    prompts: list[Prompt]  # to collect records of
    bad: BadLines
    separate: list[Prompt] | None  # to report on, if they have a file of their own; else those of the test records
    bad_separate: BadLines


def train(config: FilterTraining) -> dict[str, Any]:
    """Trains, measures and exports a filter, or finishes what an interrupted run began.

    Args:
        config: all settings.

    Returns:
        The metrics, which are in the exported folder's metrics.json too: the comparison on held-out prompts, the
        quality on the test records, seconds of this run, counts, versions and settings.

    Raises:
        UsageError: output, data, model, tokenizer or mesh do not work out.
    """
    with opened(config.output, _reads(config)) as run, _records_folder(config, run) as folder:
        mesh = make_mesh(**dataclasses.asdict(config.mesh), batch_size=config.decode.batch_size)
        asked = ask(config)
        identity = _identity(config, asked, mesh)
        if metrics := run.begin(identity, reported=_reported(config, asked)):
            return metrics
        hosts.from_first(lambda: outdated(folder, _of_records(identity), overwrite=config.output.overwrite))
        return _train(config, asked, run=run, records=folder, identity=identity)


def _train(
    config: FilterTraining, asked: Asked, *, run: RunFolder, records: Path, identity: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    decoder, codec = open_decoder(config)
    separate, questions = encode(config, asked, decoder, codec)
    _, _, test = split_prompts(range(len(questions.tokens)), seed=config.fit.seed)
    reported = separate or questions.part(samples.spread(test.tolist(), config.data.eval_prompts))
    held_out = HeldOutPrompts(reported.prompts, reported.tokens, codec=codec)
    hosts.meet()
    run.open(identity)
    seconds = {"prepare": time.perf_counter() - start}

    prompts = hashlib.sha256(repr(questions.tokens).encode()).hexdigest()
    collected = collect(
        decoder,
        questions.tokens,
        folder=records,
        identity=_of_records(identity) | {"prompts": prompts},
        overwrite=config.output.overwrite,
    )
    seconds["collect"] = time.perf_counter() - start - sum(seconds.values())
    parts = split(collected, seed=config.fit.seed)
    network = FilterConfig(collected.block_length, **dataclasses.asdict(config.network))
    with decoder.computing():
        fitted = fit(parts.training, parts.validation, network=network, settings=config.fit, run=run)
        measured = quality(fitted.filter, parts.test, positions=config.fit.positions)
    seconds["fit"] = time.perf_counter() - start - sum(seconds.values())
    comparison = []
    if held_out.prompts:
        comparison = compare(
            decoder.model,
            fitted.filter,
            held_out,
            config=config.decoding(),
            report=config.report,
            end_ids=decoder.end_ids,
        )
    seconds["report"] = time.perf_counter() - start - sum(seconds.values())
    metrics = {
        "comparison": comparison,
        "comparison_prompts": len(held_out.prompts),
        "test": measured,
        "records": collected.size,
        "training_records": parts.training.size,
        "validation_records": parts.validation.size,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.history[-1].epoch,
        "parameters": sum((inputs + 1) * outputs for inputs, outputs in network.layer_sizes),
        "seconds": seconds,
        **environment(config=config, model=decoder.model),
        IDENTITY: {**identity, **_reported(config, asked)},
    }
    _export(config, fitted, run=run, metrics=metrics)
    run.finish()
    return metrics


def _export(config: FilterTraining, fitted: Fitted, *, run: RunFolder, metrics: Mapping[str, Any]) -> None:
    """Writes the filter with what is known of it."""
    with files.new_folder(run.target, overwrite=config.output.overwrite) as target:
        save_filter(target, fitted.filter.params)
        if hosts.is_first():
            plot_fit(target / "fit.png", fitted.history, best_epoch=fitted.best_epoch)
            plot_quality(target / "quality.png", metrics["test"])
            (target / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def open_decoder(config: FilterTraining) -> tuple[Decoder, text.TextCodec]:
    """The decoder of the answers to agree with, and the tokenizer.

    Raises:
        UsageError: the model, its tokenizer or the mesh do not work out.
    """
    decoding = config.decoding()
    mesh = make_mesh(**dataclasses.asdict(config.mesh), batch_size=config.decode.batch_size)
    model, codec, end_ids = open_text_model(decoding, mesh)
    return Decoder(model, decoding, end_ids=end_ids), codec


def ask(config: FilterTraining) -> Asked:
    """Reads or draws the prompts.

    Raises:
        UsageError: a file cannot be read, or a line is bad and data.on_error is fail.
    """
    data = config.data
    bad = BadLines(data.path or samples.BUILT_IN, data.on_error)
    if data.path:
        prompts = samples.read(data.path, bad, field="data.path", answers=True)
    else:
        prompts = samples.built_in(data.prompts, seed=config.fit.seed)
    path = data.eval_path or ("" if data.path else str(tasks.HELD_OUT))
    if not path:
        return Asked(prompts, bad, None, bad)
    bad_separate = BadLines(path, "fail")
    separate = samples.read(path, bad_separate, field="data.eval_path", answers=True)
    return Asked(prompts, bad, samples.spread(separate, data.eval_prompts), bad_separate)


def encode(
    config: FilterTraining, asked: Asked, decoder: Decoder, codec: text.TextCodec
) -> tuple[Questions | None, Questions]:
    """The prompts to report on, if they have a file of their own, and those to collect records of.

    Of the latter each once, and none of the former.

    Raises:
        UsageError: a prompt cannot be decoded, and data.on_error is fail.
    """
    separate = None if asked.separate is None else _encoded(asked.separate, asked.bad_separate, decoder, codec)
    questions = _encoded(asked.prompts, asked.bad, decoder, codec)
    asked.bad.report(good=len(questions.prompts))
    taken = set(map(tuple, separate.tokens)) if separate else set()
    last_of = {tuple(tokens): i for i, tokens in enumerate(questions.tokens)}
    kept = [i for tokens, i in last_of.items() if tokens not in taken]
    return separate, questions.part(samples.spread(kept, config.data.prompts))


def _encoded(prompts: Sequence[Prompt], bad: BadLines, decoder: Decoder, codec: text.TextCodec) -> Questions:
    questions = Questions([], [])
    for prompt in prompts:
        with bad.line(prompt.line):
            tokens = codec.encode(prompt)
            decoder.check(tokens)
            questions.prompts.append(prompt)
            questions.tokens.append(tokens)
    return questions


def _reads(config: FilterTraining) -> dict[str, Path]:
    """Setting -> file or folder that the training reads."""
    named = {f"data.{name}": Path(getattr(config.data, name)) for name in PATHS if getattr(config.data, name)}
    return sources(config.decoding()) | named


def _identity(config: FilterTraining, asked: Asked, mesh: Mesh) -> dict[str, Any]:
    """What decides the filter."""
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("network", "fit")}
    return {
        **basis(config.decoding(), mesh, sections=RECORDED),
        **settings,
        "mesh": dict(mesh.shape),
        "data": {"prompts": config.data.prompts, "on_error": config.data.on_error},
        "prompts": digest(asked.prompts, with_answers=True),
    }


def _reported(config: FilterTraining, asked: Asked) -> dict[str, Any]:
    """What decides the report on the filter besides."""
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("learn2pd", "report")}
    held_out = digest(asked.separate or [], with_answers=True)
    return {**settings, "data.eval_prompts": config.data.eval_prompts, "held_out": held_out}


def _of_records(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the records besides the prompts that are left when they have tokens."""
    return {name: identity[name] for name in (VERSION, "platform", "mesh", "files", *RECORDED)}


@contextlib.contextmanager
def _records_folder(config: FilterTraining, run: RunFolder) -> Iterator[Path]:
    """Where the records are; no other process writes them while the block runs."""
    if not config.data.records_path:
        yield run.folder / "records"
        return
    folder = Path(config.data.records_path).resolve()
    if not hosts.is_first():
        yield folder
        return
    check_apart([folder], _reads(config), field="data.records_path")
    with only_writer(folder, field="data.records_path"):
        yield folder
