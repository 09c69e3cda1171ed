"""Trains a filter for the policy learn2pd: collects records, fits, compares, exports (Learn2PD, arXiv 2509.25188)."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_jax import jobs
from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.filters import save_filter
from dllm_jax.data import samples, tasks
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.decoding import text
from dllm_jax.decoding.generate import Decoder
from dllm_jax.mesh import make_mesh
from dllm_jax.models.filter import FilterConfig
from dllm_jax.training.collect import collect
from dllm_jax.training.filter_config import FilterTraining
from dllm_jax.training.filter_fit import fit
from dllm_jax.training.filter_plots import plot_fit, plot_quality
from dllm_jax.training.filter_quality import quality
from dllm_jax.training.filter_report import compare
from dllm_jax.training.held_out import HeldOutPrompts
from dllm_jax.training.records import split, split_prompts
from dllm_jax.training.run import RunFolder


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts and their tokens."""

    prompts: list[Prompt]
    tokens: list[list[int]]

    def part(self, places: Sequence[int]) -> "Questions":
        """Some of them."""
        return Questions([self.prompts[i] for i in places], [self.tokens[i] for i in places])


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
    start = time.perf_counter()
    run = RunFolder(config.output)
    decoder, codec = open_decoder(config)
    separate = read_separate(config, decoder, codec)
    questions = read(config, decoder, codec, reserved=separate)
    _, _, test = split_prompts(range(len(questions.tokens)), seed=config.fit.seed)
    reported = separate or questions.part(samples.spread(test.tolist(), config.data.eval_prompts))
    held_out = HeldOutPrompts(reported.prompts, reported.tokens, codec=codec)
    run.open(_identity(config, decoder, questions))
    seconds = {"prepare": time.perf_counter() - start}

    folder = Path(config.data.records_path).resolve() if config.data.records_path else run.folder / "records"
    identity = _records_identity(config, decoder, questions)
    records = collect(decoder, questions.tokens, folder=folder, identity=identity, overwrite=config.output.overwrite)
    seconds["collect"] = time.perf_counter() - start - sum(seconds.values())
    parts = split(records, seed=config.fit.seed)
    network = FilterConfig(records.block_length, **dataclasses.asdict(config.network))
    with decoder.computing():
        fitted = fit(parts.training, parts.validation, network=network, settings=config.fit, run=run)
        measured = quality(fitted.filter, parts.test, positions=config.fit.positions)
    seconds["fit"] = time.perf_counter() - start - sum(seconds.values())
    comparison = []
    if held_out.prompts:
        comparison = compare(
            decoder.model, fitted.filter, held_out, config=config.decoding(), report=config.report,
            end_ids=decoder.end_ids,
        )  # fmt: skip
    seconds["report"] = time.perf_counter() - start - sum(seconds.values())
    metrics = {
        "comparison": comparison,
        "comparison_prompts": len(held_out.prompts),
        "test": measured,
        "records": records.size,
        "training_records": parts.training.size,
        "validation_records": parts.validation.size,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.history[-1].epoch,
        "parameters": sum((inputs + 1) * outputs for inputs, outputs in network.layer_sizes),
        "seconds": seconds,
        **jobs.environment(config=config, model=decoder.model),
    }
    with files.new_folder(run.target, overwrite=config.output.overwrite) as target:
        save_filter(target, fitted.filter.params)
        plot_fit(target / "fit.png", fitted.history, best_epoch=fitted.best_epoch)
        plot_quality(target / "quality.png", measured)
        (target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    run.finish()
    return metrics


def open_decoder(config: FilterTraining) -> tuple[Decoder, text.TextCodec]:
    """The decoder of the answers to agree with, and the tokenizer.

    Raises:
        UsageError: the model, its tokenizer or the mesh do not work out.
    """
    decoding = config.decoding()
    mesh = make_mesh(**dataclasses.asdict(config.mesh), batch_size=config.decode.batch_size)
    model, codec, end_ids = jobs.open_text_model(decoding, mesh)
    return Decoder(model, decoding, end_ids=end_ids), codec


def read(config: FilterTraining, decoder: Decoder, codec: text.TextCodec, *, reserved: Questions | None) -> Questions:
    """The prompts to collect records of, each once and none of the reserved ones.

    Raises:
        UsageError: the file cannot be read, or a line is bad and data.on_error is fail.
    """
    data = config.data
    bad = BadLines(data.path or samples.BUILT_IN, data.on_error)
    if data.path:
        prompts = samples.read(data.path, bad, field="data.path", answers=True)
    else:
        prompts = samples.built_in(data.prompts, seed=config.fit.seed)
    questions = _encoded(prompts, bad, decoder, codec)
    bad.report(good=len(questions.prompts))
    taken = set(map(tuple, reserved.tokens)) if reserved else set()
    last_of = {tuple(tokens): i for i, tokens in enumerate(questions.tokens)}
    kept = [i for tokens, i in last_of.items() if tokens not in taken]
    return questions.part(samples.spread(kept, data.prompts))


def read_separate(config: FilterTraining, decoder: Decoder, codec: text.TextCodec) -> Questions | None:
    """The prompts to report on, if they have a file of their own; else they are those of the test records.

    Raises:
        UsageError: the file cannot be read, or a line is bad.
    """
    data = config.data
    path = data.eval_path or ("" if data.path else str(tasks.HELD_OUT))
    if not path:
        return None
    bad = BadLines(path, "fail")
    prompts = samples.spread(samples.read(path, bad, field="data.eval_path", answers=True), data.eval_prompts)
    return _encoded(prompts, bad, decoder, codec)


def _encoded(prompts: Sequence[Prompt], bad: BadLines, decoder: Decoder, codec: text.TextCodec) -> Questions:
    questions = Questions([], [])
    for prompt in prompts:
        with bad.line(prompt.line):
            tokens = codec.encode(prompt)
            decoder.check(tokens)
            questions.prompts.append(prompt)
            questions.tokens.append(tokens)
    return questions


def _records_identity(config: FilterTraining, decoder: Decoder, questions: Questions) -> dict[str, Any]:
    """What decides the records."""
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "tokenizer", "decode")}
    del settings["model"]["verify"]
    mesh = decoder.model.mesh
    prompts = hashlib.sha256(repr(questions.tokens).encode()).hexdigest()
    return settings | {"mesh": dict(mesh.shape), "prompts": prompts, "platform": mesh.devices.flat[0].platform}


def _identity(config: FilterTraining, decoder: Decoder, questions: Questions) -> dict[str, Any]:
    """What decides the filter."""
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("network", "fit")}
    return _records_identity(config, decoder, questions) | settings
