"""The job that decode.run and decode.eval share: prepare everything, decode batch by batch, write results."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.progress
from jax.sharding import Mesh

from dllm_jax import hosts
from dllm_jax.checkpoints import fingerprint
from dllm_jax.checkpoints.load import load_model, resolve
from dllm_jax.config import Config
from dllm_jax.data import stops, text
from dllm_jax.data.outputs import Finished, ResultFile, Row, difference
from dllm_jax.data.prompts import BadLines, Check, Prompt, read, source
from dllm_jax.decoding import end_tokens
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.build import companions_of, open_companions
from dllm_jax.decoding.state import DecodeResult, Timing
from dllm_jax.errors import UsageError
from dllm_jax.identity import identity, sources
from dllm_jax.memory import bytes_per_device, check_fits
from dllm_jax.mesh import weight_shardings
from dllm_jax.models.model import Model, abstract_model, random_model
from dllm_jax.placement import decode_mesh, model_shape
from dllm_jax.places import only_writer
from dllm_jax.progress import for_people
from dllm_jax.settings import TokenizerSettings
from dllm_jax.version import __version__

SHOWN_ERRORS = 20  # ids of failed rows named on stderr; all are in the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a decode needs, checked."""

    config: Config
    decoder: Decoder
    codec: text.TextCodec | None
    prompts: list[Prompt]
    tokens: list[list[int]]  # of every prompt
    file: ResultFile | None  # None: the caller prints
    done: dict[int, Row]  # rows of an earlier, unfinished run by index of the prompt


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What came out of a job."""

    rows: list[Row]  # in input order
    timed_rows: list[Row]  # those decoded in this run, to which the next two belong
    iterations: int
    columns: int  # see `DecodeResult`
    timing: Timing


class Outcome(NamedTuple):
    """What a command tells of its job."""

    prompts: list[Prompt]
    rows: list[Row]  # in input order; those of bad lines that were left out are missing
    metrics: dict[str, Any]


Score = Callable[[Sequence[Prompt], Sequence[Row]], tuple[list[Row], dict[str, Any]]]  # rows with scores, metrics


def run(
    config: Config,
    *,
    command: str,
    check: Check | None = None,
    score: Score | None = None,
    prompts: Sequence[Prompt] | None = None,
    field: str = "output.path",
) -> Outcome:
    """The whole job: decodes what is not decoded yet, writes everything; says so if there is nothing to do.

    Args:
        config: all settings.
        command: whose output lines these are; part of the job's identity.
        check: a further check of every prompt; see `prompts.read`.
        score: adds scores to the output lines and the metrics.
        prompts: what to decode (default: what `input` names).
        field: the setting that output.path comes from, for errors.

    Raises:
        UsageError: output, prompts, model, tokenizer or mesh do not work out.
    """
    with opened(config, field=field) as file:
        bad = BadLines(source(config.input), config.input.on_error)
        asked = list(prompts) if prompts is not None else read(config.input, bad, check=check)
        mesh = decode_mesh(config, prompt_length=max(map(_about_tokens, asked)))
        named = config.output.path or hosts.several()
        itself = identity(config, asked, mesh, command=command) if named else {}
        if hosts.several():
            here = fingerprint.without_times(itself)
            hosts.same("settings, files and prompts", here, difference=difference)
        begun = hosts.from_first(lambda: file.begin(itself) if file else {})
        if isinstance(begun, Finished):
            print(f"finished already: {config.output.path}", file=sys.stderr)
            return Outcome(asked, *begun)
        job = prepare(config, asked, mesh, bad=bad, file=file, done=begun)
        if config.output.stop and not job.codec:
            raise UsageError(f"output.stop: expected none without a tokenizer, got {config.output.stop!r}")
        if score and not job.codec:
            raise UsageError(f"tokenizer.path: expected a tokenizer, to score text, got none in {config.model.path!r}")
        hosts.meet()
        result = decode(job)
        scores: dict[str, Any] = {}
        if score:
            rows, scores = score(job.prompts, result.rows)
            result = dataclasses.replace(result, rows=rows)
        return Outcome(job.prompts, result.rows, finish(job, result, scores=scores))


@contextlib.contextmanager
def opened(config: Config, *, field: str) -> Iterator[ResultFile | None]:
    """The output of a job, checked and locked; None without output.path, and in all processes but the first.

    Raises:
        UsageError: it cannot be written, is something that the job reads, or another job writes it.
    """
    if not config.output.path or not hosts.is_first():
        yield None
        return
    file = ResultFile(config.output, field=field)
    places = sources(config)
    if config.input.path:
        places["input.path"] = Path(config.input.path)
    fingerprint.check_apart(file.names, places, field=field)
    with only_writer(file.path, field=field):
        yield file


def prepare(
    config: Config,
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    bad: BadLines,
    file: ResultFile | None,
    done: dict[int, Row],
) -> Job:
    """Loads the models and encodes the prompts.

    Args:
        config: all settings.
        prompts: what to decode.
        mesh: the devices.
        bad: what happens with prompts that cannot be decoded.
        file: where results go.
        done: rows of an earlier run by index of the prompt.

    Raises:
        UsageError: prompts, model or tokenizer do not work out.
    """
    companions = open_companions(config, mesh)
    model = open_model(config, mesh)
    codec = load_codec(config, model)
    check_tokens(model, companions, config=config, codec=codec)
    end_ids = end_tokens.end_tokens(model.config, codec, setting=config.model.eot_token_id)
    decoder = Decoder(model, config, end_ids=end_ids, **companions)
    kept, tokens = [], []
    for prompt in prompts:
        with bad.line(prompt.line):
            encoded = _encode(prompt, codec)
            decoder.check(encoded)
            kept.append(prompt)
            tokens.append(encoded)
    bad.report(good=len(kept))
    ends = end_tokens.names(end_ids, codec)
    print("end of text:", ", ".join(f"{i} {name}".strip() for i, name in ends.items()), file=sys.stderr)
    return Job(config=config, decoder=decoder, codec=codec, prompts=kept, tokens=tokens, file=file, done=done)


def decode(job: Job) -> JobResult:
    """Decodes the prompts that are not done yet; finished batches go to the partial file at once."""
    pending = [place for place, prompt in enumerate(job.prompts) if prompt.index not in job.done]
    fresh: dict[int, Row] = {}
    iterations, columns, timing = 0, 0, Timing(0.0, 0.0, 0, 0)
    with rich.progress.Progress(**for_people()) as progress:
        bar = progress.add_task("decoding", total=len(job.prompts), completed=len(job.prompts) - len(pending))
        indices = [job.prompts[place].index for place in pending]
        for batch, result in job.decoder.stream([job.tokens[place] for place in pending], rows=indices):
            places = [pending[i] for i in batch]
            prompts = [job.prompts[place] for place in places]
            rows = {prompt.index: _row(prompt, result, i, job) for i, prompt in enumerate(prompts)}
            if job.config.output.trace:
                for i, place in enumerate(places):
                    rows[prompts[i].index] |= _trace(job, result, i, prompt_ids=job.tokens[place])
            if job.file:
                job.file.append(rows)
            fresh |= rows
            iterations, columns = iterations + result.iterations, columns + result.columns
            timing += result.timing
            progress.advance(bar, len(batch))
    rows = job.done | fresh
    return JobResult([rows[prompt.index] for prompt in job.prompts], list(fresh.values()), iterations, columns, timing)


def finish(job: Job, result: JobResult, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the metrics together and, with output.path, writes results and metrics in their final place.

    Args:
        job: from `prepare`.
        result: from `decode`.
        scores: further metrics, in front of the common ones.

    Returns:
        All metrics. Seconds, iterations, columns and rates cover the `timed_samples` decoded in this run.
    """
    ends = {str(i): name for i, name in end_tokens.names(job.decoder.end_ids, job.codec).items()}
    metrics = {
        **scores,
        **_counts(job, result),
        "end_tokens": ends,
        **environment(config=job.config, model=job.decoder.model),
    }
    if job.file:
        job.file.finish(result.rows, metrics)
    return metrics


def exit_code(rows: Sequence[Row]) -> int:
    """The exit code of a finished job: 1 if rows ended with an error, which are named on stderr, else 0."""
    failed = [str(row["id"]) for row in rows if row["finish_reason"] == "error"]
    if not failed:
        return 0
    shown = ", ".join(failed[:SHOWN_ERRORS]) + (", ..." if len(failed) > SHOWN_ERRORS else "")
    print(
        f"error: {len(failed)} of {len(rows)} rows ended with finish_reason error (the model gave NaN or infinite "
        f"numbers, or decoding did not end within the forwards it can need): {shown}",
        file=sys.stderr,
    )
    return 1


def summary(metrics: Mapping[str, Any]) -> str:
    """The metrics for a reader, in a few lines."""
    lines = [
        f"{metrics['num_samples']} samples: {metrics['num_tokens']} tokens in {metrics['nfe_sum']} forwards, "
        f"{metrics['tokens_per_forward']:.2f} tokens per forward ({metrics['committed_per_forward']:.2f} committed, "
        "with those behind the end of text)",
        f"compile {metrics['compile_seconds']:.1f} s (programs: {metrics['compilations']}, "
        f"from the compilation cache: {metrics['cache_hits']}), "
        f"decode {metrics['decode_seconds']:.2f} s on {metrics['device']['kind']}, {metrics['dtype']}",
    ]
    if metrics["timed_samples"]:
        lines[1] += (
            f": {metrics['tokens_per_second']:.1f} tokens/s to the end of text, "
            f"{metrics['canvas_tokens_per_second']:.1f} of the whole canvas"
        )
    if metrics["timed_samples"] < metrics["num_samples"]:
        lines.append(f"seconds and rates cover the {metrics['timed_samples']} samples decoded in this run")
    return "\n".join(lines)


def open_model(config: Config, mesh: Mesh) -> Model:
    """The checkpoint of model.path, or random weights with the shape of model.preset."""
    settings = config.model
    if not settings.preset:
        track = functools.partial(rich.progress.track, description="loading", **for_people())
        return load_model(
            settings.path,
            dtype=settings.dtype,
            quantize=settings.quantize,
            mesh=mesh,
            verify=settings.verify,
            track=track,
        )
    shape, dtype = model_shape(config, platform=mesh.devices.flat[0].platform)
    _, abstract = abstract_model(shape, dtype=dtype)
    check_fits(
        bytes_per_device(abstract, weight_shardings(abstract, mesh)), mesh, field="model.preset", got=settings.preset
    )
    return random_model(shape, dtype=dtype, mesh=mesh, seed=config.decode.seed)


def check_tokens(model: Model, networks: Mapping[str, Any], *, config: Config, codec: text.TextCodec | None) -> None:
    """Compares the tokens of the model with those of the policy's own networks."""
    for companion in companions_of(config):
        theirs = text.load(companion.place(config), TokenizerSettings(chat_template="off"))
        companion.check_tokens(
            networks[companion.name],
            model,
            model_tokens=codec.tokenizer.get_vocab() if codec else None,
            tokens=theirs.tokenizer.get_vocab() if theirs else None,
        )


def load_codec(config: Config, model: Model) -> text.TextCodec | None:
    """The tokenizer of tokenizer.path, else of the model's folder; None if that has none.

    Raises:
        UsageError: it cannot be read, or belongs to another model.
    """
    path = config.tokenizer.path or model.path
    if not path:
        return None
    codec = text.load(resolve(path, field="tokenizer.path"), config.tokenizer)
    if codec:
        text.check_vocabulary(codec, model.config.vocab_size)
    elif config.tokenizer.path:
        raise UsageError(
            f"tokenizer.path: expected tokenizer.json or vocab.json and merges.txt in {path!r}, got neither"
        )
    return codec


def open_text_model(config: Config, mesh: Mesh) -> tuple[Model, text.TextCodec, tuple[int, ...]]:
    """The model, its tokenizer and the tokens that end a text, for commands that cannot do without text.

    Raises:
        UsageError: one of them is missing or broken.
    """
    model = open_model(config, mesh)
    codec = load_codec(config, model)
    if codec is None:
        raise UsageError(f"tokenizer.path: expected a tokenizer, to read text, got none in {model.path!r}")
    return model, codec, end_tokens.end_tokens(model.config, codec, setting=config.model.eot_token_id)


def _about_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt before there is a tokenizer, rather too many: one for every two characters."""
    if prompt.prompt_ids is not None:
        return len(prompt.prompt_ids)
    texts = [prompt.text or "", *(message["content"] or "" for message in prompt.messages or ())]
    return sum(map(len, texts)) // 2 + 1


def _encode(prompt: Prompt, codec: text.TextCodec | None) -> list[int]:
    if codec:
        return codec.encode(prompt)
    if prompt.prompt_ids is None:
        raise UsageError("expected prompt_ids, since the model's folder has no tokenizer (tokenizer.path), got text")
    return list(prompt.prompt_ids)


def _row(prompt: Prompt, result: DecodeResult, i: int, job: Job) -> Row:
    """The output line of row `i` of a batch."""
    output_ids, masks_left = result.tokens_BG[i].tolist(), int(result.masks_left_B[i])
    shown, num_tokens, reason = None, int(result.num_tokens_B[i]), result.finish_reason[i]
    if job.codec:
        wanted = (*job.config.output.stops, *prompt.stop)
        shown, num_tokens, stopped = stops.cut(job.codec, result.text_ids(i), wanted)
        reason = stops.STOPPED if stopped and reason != "error" else reason
    return {
        "id": prompt.id,
        "text": shown,
        "output_ids": output_ids,
        "num_tokens": num_tokens,
        **({"masks_left": masks_left} if masks_left else {}),
        "nfe": int(result.nfe_B[i]),
        "commit_step": result.commit_step_BG[i].tolist(),
        "finish_reason": reason,
    } | (result.log.row(i) if result.log else {})


def _trace(job: Job, result: DecodeResult, i: int, *, prompt_ids: list[int]) -> Row:
    """What a viewer of row `i` of a batch needs besides `_row`: with commit_step, the canvas after every step."""
    return {
        "prompt_ids": prompt_ids,
        "pieces": job.codec.pieces(result.tokens_BG[i].tolist()) if job.codec else None,
        "confidence": [round(float(c), 6) for c in result.confidence_BG[i]],
        "block_length": job.decoder.block_length,
    }


def _counts(job: Job, result: JobResult) -> dict[str, Any]:
    """Tokens, forwards and seconds of all rows, or of those decoded in this run."""
    num_tokens = sum(row["num_tokens"] for row in result.rows)
    nfe = sum(row["nfe"] for row in result.rows)
    timed_tokens = sum(row["num_tokens"] for row in result.timed_rows)
    timed_canvas = len(result.timed_rows) * job.config.decode.gen_length
    seconds = result.timing.decode_seconds
    phases = [row.get("forwards_by_phase", {}) for row in result.rows]
    by_phase = {phase: sum(counts[phase] for counts in phases) for phase in phases[0]}
    return {
        "tokens_per_forward": num_tokens / nfe,
        "committed_per_forward": sum(step > 0 for row in result.rows for step in row["commit_step"]) / nfe,
        "tokens_per_second": timed_tokens / seconds if seconds else None,
        "canvas_tokens_per_second": timed_canvas / seconds if seconds else None,
        "num_samples": len(result.rows),
        "num_tokens": num_tokens,
        "nfe_sum": nfe,
        "nfe_mean": nfe / len(result.rows),
        "num_errors": sum(row["finish_reason"] == "error" for row in result.rows),
        **({"forwards_by_phase": by_phase} if by_phase else {}),
        "timed_samples": len(result.timed_rows),
        "iterations": result.iterations,
        "columns": result.columns,
        **dataclasses.asdict(result.timing),
    }


def environment(*, config: Any, model: Model) -> dict[str, Any]:
    """What metrics were measured with."""
    device = model.mesh.devices.flat[0]
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "dtype": str(model.dtype),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "mesh": dict(model.mesh.shape),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "dllm_jax": __version__,
        },
        "config": dataclasses.asdict(config),
    }
