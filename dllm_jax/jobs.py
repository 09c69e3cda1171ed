"""The job that decode.run and decode.eval share: prepare everything, decode batch by batch, write results.

Nothing here grows with the input but a few numbers a line: prompts are read again when they are decoded, rows go to the
partial file at once, and metrics are sums.
"""

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.progress
from jax.sharding import Mesh

from dllm_jax import hosts, remote
from dllm_jax.checkpoints import fingerprint
from dllm_jax.config import Config
from dllm_jax.data import stop_strings, text, traces
from dllm_jax.data.outputs import difference
from dllm_jax.data.prompts import BadLines, Check, Prompt, PromptFile, read, source
from dllm_jax.data.results import ERRORS, Finished, ResultFile
from dllm_jax.data.rows import GrowingRows, Row, Rows
from dllm_jax.data.tally import Tally
from dllm_jax.decoding import end_tokens
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.errors import Stopped, UsageError
from dllm_jax.identity import Digest, identity, sources
from dllm_jax.kept import Kept
from dllm_jax.metrics import Decoded, counts, environment
from dllm_jax.opening import check_tokens, load_codec
from dllm_jax.placement import decode_mesh
from dllm_jax.places import only_writer
from dllm_jax.progress import for_people
from dllm_jax.questions import Question, Questions
from dllm_jax.stops import Stop, on_sigterm

SHOWN_ERRORS = 20  # ids of failed rows named on stderr; all are in the output


class Score(NamedTuple):
    """How rows are scored."""

    row: Callable[[Prompt, Row], Row]  # the row with its scores
    metrics: Callable[[Tally], dict[str, Any]]  # of all rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a decode needs, checked."""

    config: Config
    decoder: Decoder
    codec: text.TextCodec | None
    questions: Questions
    file: ResultFile | None  # None: process 0 has it
    score: Score | None

    @property
    def output(self) -> ResultFile:
        """The file, in process 0."""
        assert self.file
        return self.file


class Outcome(NamedTuple):
    """What a command tells of its job."""

    prompts: Sequence[Prompt]  # those that were decoded
    rows: Sequence[Row]  # in input order; none in processes other than the first
    metrics: dict[str, Any]


def run(
    config: Config,
    *,
    command: str,
    check: Check | None = None,
    score: Score | None = None,
    prompts: Sequence[Prompt] | None = None,
    field: str = "output.path",
    networks: Kept | None = None,
) -> Outcome:
    """The whole job: decodes what is not decoded yet, writes everything; says so if there is nothing to do.

    Args:
        config: all settings.
        command: whose output lines these are; part of the job's identity.
        check: a further check of every prompt; see `prompts.read`.
        score: adds scores to the output lines and the metrics.
        prompts: what to decode (default: what `input` names).
        field: the setting that output.path comes from, for errors.
        networks: those of an earlier job, and of this one for the next.

    Raises:
        UsageError: output, prompts, model, tokenizer or mesh do not work out.
        Stopped: SIGTERM came; what is decoded is written, and the same job goes on there.
    """
    stopping = on_sigterm() if config.output.path else contextlib.nullcontext(Stop())
    with stopping as stop, opened(config, field=field) as file, _errors(config, file) as errors:
        bad = BadLines(source(config.input), config.input.on_error, log=errors.add if errors else None)
        survey = _Survey(with_answers=command == "decode.eval")
        asked = read(config.input, bad, check=check, seen=survey) if prompts is None else prompts
        for prompt in prompts or ():
            survey(prompt)
        mesh = decode_mesh(config, prompt_length=survey.longest)
        named = config.output.path or hosts.several()
        itself = identity(config, survey.digest.hexdigest(), mesh, command=command) if named else {}
        if hosts.several():
            here = fingerprint.without_times(itself)
            hosts.same("settings, files and prompts", here, difference=difference)
        finished: list[Finished] = []  # in process 0
        if metrics := hosts.from_first(lambda: _begin(file, itself, finished)):
            print(f"finished already: {config.output.path}", file=sys.stderr)
            return Outcome(asked, finished[0].rows if finished else Rows([]), metrics)
        job = prepare(config, asked, mesh, bad=bad, file=file, score=score, networks=networks or Kept())
        if errors:
            job.output.write_errors(errors.lines() if bad.count else None)
        decoded = decode(job, stop)
        metrics = hosts.from_first(lambda: finish(job, decoded, bad_lines=bad.count))
        rows = file.rows() if file else Rows([])
        if file and not config.output.path:
            rows.hold()
        return Outcome(job.questions.prompts(), rows, metrics)


class _Survey:
    """What is known of prompts that were seen once: how long they are, about, and what tells them from others."""

    def __init__(self, *, with_answers: bool) -> None:
        self.longest = 1  # tokens of the longest, about
        self.digest = Digest(with_answers=with_answers)

    def __call__(self, prompt: Prompt) -> None:
        self.longest = max(self.longest, _about_tokens(prompt))
        self.digest.add(prompt)


def _begin(file: ResultFile | None, itself: Mapping[str, Any], finished: list[Finished]) -> dict[str, Any]:
    """The metrics if the job is finished; what it left goes to `finished`, since rows are not told to others."""
    if not file or not (found := file.begin(itself)):
        return {}
    finished.append(found)
    return found.metrics


@contextlib.contextmanager
def opened(config: Config, *, field: str) -> Iterator[ResultFile | None]:
    """The output of a job, checked and locked; in a temporary folder without output.path; None but in process 0.

    Raises:
        UsageError: it cannot be written, is something that the job reads, or another job writes it.
    """
    if not hosts.is_first():
        yield None
    elif not config.output.path:
        with tempfile.TemporaryDirectory(prefix="dllm_jax-") as folder:
            path = str(Path(folder) / "out.jsonl")
            yield ResultFile(dataclasses.replace(config.output, path=path, shard_lines=0), field=field)
    else:
        file = ResultFile(config.output, field=field)
        _check_apart(config, file.names, field=field)
        with only_writer(file.path, field=field):
            yield file


def _check_apart(config: Config, names: Sequence[Path], *, field: str) -> None:
    """Refuses an output that the job reads."""
    places = sources(config)
    if config.input.path and not remote.is_remote(config.input.path):
        places["input.path"] = Path(config.input.path)
    fingerprint.check_apart(names, places, field=field)


@contextlib.contextmanager
def _errors(config: Config, file: ResultFile | None) -> Iterator["_Errors | None"]:
    """Where bad lines are noted until all are found; None if nobody wants them."""
    if not (file and config.output.path and config.input.on_error == "skip"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dllm_jax-") as folder:
        yield _Errors(Path(folder) / f"lines{ERRORS}")


class _Errors(GrowingRows):
    """Bad lines of the input, by their number."""

    def add(self, number: int, told: str, line: bytes) -> None:
        """Adds a line and what is wrong with it."""
        shown = line.decode(errors="backslashreplace")
        self.append({number: {"line": number, "error": told, "text": shown}})


def prepare(
    config: Config,
    asked: Sequence[Prompt],
    mesh: Mesh,
    *,
    bad: BadLines,
    file: ResultFile | None,
    score: Score | None,
    networks: Kept,
) -> Job:
    """Loads the models and checks the tokens of all prompts.

    Args:
        config: all settings.
        asked: what to decode.
        mesh: the devices.
        bad: what happens with prompts that cannot be decoded.
        file: where results go.
        score: adds scores to the output lines.
        networks: those that may be loaded already.

    Raises:
        UsageError: prompts, model or tokenizer do not work out.
    """
    model, companions = networks.open(config, mesh)
    codec = load_codec(config, model)
    check_tokens(model, companions, config=config, codec=codec)
    end_ids = end_tokens.end_tokens(model.config, codec, setting=config.model.eot_token_id)
    decoder = Decoder(model, config, end_ids=end_ids, **companions)
    questions = Questions(asked, codec)
    line = asked.text if isinstance(asked, PromptFile) else lambda place: b""
    for place, prompt in enumerate(asked):
        with bad.line(prompt.line, text=functools.partial(line, place)):
            tokens = questions.encode(prompt)
            decoder.check(tokens)
            questions.keep(place, prompt, length=len(tokens))
    bad.report(good=len(questions))
    ends = end_tokens.names(end_ids, codec)
    print("end of text:", ", ".join(f"{i} {name}".strip() for i, name in ends.items()), file=sys.stderr)
    own, asked_for = model.config.causal_block, decoder.config.decode.block_length
    if model.config.block_causal and own != asked_for:
        print(f"decode.block_length: {asked_for}, the model's own is {own} (0 takes that)", file=sys.stderr)
    if config.output.stop and not codec:
        raise UsageError(f"output.stop: expected none without a tokenizer, got {config.output.stop!r}")
    if score and not codec:
        raise UsageError(f"tokenizer.path: expected a tokenizer, to score text, got none in {config.model.path!r}")
    hosts.meet()
    return Job(config=config, decoder=decoder, codec=codec, questions=questions, file=file, score=score)


def decode(job: Job, stop: Stop) -> Decoded:
    """Decodes the prompts that are not done yet; finished rows go to the partial file at once.

    Args:
        job: from `prepare`.
        stop: asked between batches whether to end early.

    Raises:
        UsageError: a finished file of the output was changed.
        Stopped: it had to end.
    """
    decoded, total = Decoded(), len(job.questions)
    with rich.progress.Progress(**for_people()) as progress:
        bar = progress.add_task("decoding", total=total)
        for number, part in enumerate(hosts.from_first(lambda: _divide(job))):
            there = _there(job, number)
            if there is None:
                progress.update(bar, completed=part.stop)
                continue
            pending = job.questions.without(part, there)
            done = part.stop - len(pending)
            stream = job.decoder.stream(pending, lengths=pending.lengths, rows=pending.indices, halted=stop)
            for places, result in stream:
                questions = [pending.take(place) for place in places]
                if job.file:
                    lines = enumerate(questions)
                    job.file.append({each.prompt.index: _line(job, each, result, i) for i, each in lines})
                decoded.add(result)
                done += len(places)
                progress.update(bar, completed=done)
            if done < part.stop:
                raise Stopped(f"stopped: {done} of {total} lines are done; start the same command again to go on")
            _close(job, number)
    return decoded


def _divide(job: Job) -> list[range]:
    """Which places go to which file of the output."""
    parts = job.output.divide(len(job.questions))
    if len(job.output.targets) > 1:
        _check_apart(job.config, job.output.targets, field=job.output.field)
    return parts


def _there(job: Job, number: int) -> np.ndarray | None:
    """Indices of the rows that are there of a file of the output; None if the file is done."""
    return hosts.from_first(lambda: job.output.done(number))


def _close(job: Job, number: int) -> None:
    """Writes a file of the output."""
    hosts.from_first(lambda: job.output.close(number))


def finish(job: Job, decoded: Decoded, *, bad_lines: int) -> dict[str, Any]:
    """Puts the metrics together and writes what is left to write.

    Args:
        job: from `prepare`.
        decoded: from `decode`.
        bad_lines: lines of the input that were left out.

    Returns:
        All metrics. Seconds, iterations, columns and rates cover the `timed_samples` decoded in this run.
    """
    ends = {str(i): name for i, name in end_tokens.names(job.decoder.end_ids, job.codec).items()}

    def metrics_of(tally: Tally) -> dict[str, Any]:
        return {
            **(job.score.metrics(tally) if job.score else {}),
            **counts(tally, decoded, gen_length=job.config.decode.gen_length),
            "num_bad_lines": bad_lines,
            "end_tokens": ends,
            **environment(config=job.decoder.config, model=job.decoder.model),
        }

    return job.output.finish(metrics_of)


def exit_code(outcome: Outcome) -> int:
    """The exit code of a finished job: 1 if rows ended with an error, which are named on stderr, else 0."""
    count = outcome.metrics["num_errors"]
    if not count:
        return 0
    failed: list[str] = []
    for row in outcome.rows:
        if row["finish_reason"] == "error":
            failed.append(str(row["id"]))
        if len(failed) == min(count, SHOWN_ERRORS):
            break
    shown = ", ".join(failed) + (", ..." if count > SHOWN_ERRORS else "")
    print(
        f"error: {count} of {outcome.metrics['num_samples']} rows ended with finish_reason error (the model gave NaN "
        f"or infinite numbers, or decoding did not end within the forwards it can need): {shown}",
        file=sys.stderr,
    )
    return 1


def _about_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt before there is a tokenizer, rather too many: one for every two characters."""
    if prompt.prompt_ids is not None:
        return len(prompt.prompt_ids)
    texts = [prompt.text or "", *(message["content"] or "" for message in prompt.messages or ())]
    return sum(map(len, texts)) // 2 + 1


def _line(job: Job, question: Question, result: DecodeResult, i: int) -> Row:
    """The output line of row `i` of a batch, with all that was asked for."""
    row = output_line(question, result, i, decoder=job.decoder, codec=job.codec)
    return job.score.row(question.prompt, row) if job.score else row


def output_line(
    question: Question, result: DecodeResult, i: int, *, decoder: Decoder, codec: text.TextCodec | None
) -> Row:
    """The output line of row `i` of a batch; with output.trace, with all that a viewer needs."""
    prompt, output = question.prompt, decoder.config.output
    output_ids, masks_left = result.tokens_BG[i].tolist(), int(result.masks_left_B[i])
    shown, num_tokens, reason = None, int(result.num_tokens_B[i]), result.finish_reason[i]
    if codec:
        shown, num_tokens, stopped = stop_strings.cut(codec, result.text_ids(i), (*output.stops, *prompt.stop))
        reason = stop_strings.STOPPED if stopped and reason != "error" else reason
    row = {
        "id": prompt.id,
        "text": shown,
        "output_ids": output_ids,
        "num_tokens": num_tokens,
        **({"masks_left": masks_left} if masks_left else {}),
        "nfe": int(result.nfe_B[i]),
        "commit_step": result.commit_step_BG[i].tolist(),
        "finish_reason": reason,
    } | (result.log.row(i) if result.log else {})
    if not output.trace:
        return row
    return traces.line(
        row,
        prompt_ids=question.tokens,
        confidence=result.confidence_BG[i].tolist(),
        end=int(result.end_B[i]),
        codec=codec,
        config=decoder.config,
        block_length=decoder.block_length,
    )
