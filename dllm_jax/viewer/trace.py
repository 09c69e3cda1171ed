"""A recorded decode, read back from an output line with `output.trace`: the canvas after every forward.

What is shown "at step k" is the canvas after the k-th forward of the row; at step 0 everything is masked.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_jax.errors import UsageError

MASK, SPECIAL = "·", "▫"  # a character of a masked token; a token that is no text


class State(enum.StrEnum):
    """What a position is at a step."""

    MASKED = "masked"
    REJECTED = "rejected"  # masked; a draft was proposed in this forward and not accepted
    RETRACTED = "retracted"  # masked again by this forward
    NOW = "now"  # committed in this forward
    EARLIER = "earlier"
    CUT = "cut"  # behind the row's end


@dataclasses.dataclass(frozen=True)
class Cell:
    """A position of the canvas at a step."""

    state: State
    text: str  # of the token that stands there, else of the one that is no more or not there
    is_open: bool  # in the open range of this forward
    is_seed: bool = False  # DiCo
    opens_cluster: bool = False
    closes_cluster: bool = False
    filter: float | None = None  # Learn2PD: what the filter said in this forward


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of a step."""

    forward: int
    committed: int  # in this forward
    masks_left: int
    tokens_per_forward: float  # committed so far, per forward
    least: float | None  # confidence of what was committed in this forward
    mean: float | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """One prompt decoded by one decoder; lists have an entry per generated position unless said."""

    id: str
    prompt: str
    label: str  # of the decoder
    decoder: Mapping[str, Any]  # policy, cache, blocks, stop, settings
    nfe: int
    tokens: Sequence[int]
    pieces: Sequence[str]
    special_ids: frozenset[int]  # tokens that are no text
    commit_step: Sequence[int]
    confidence: Sequence[float]
    last_end: int  # one past the last position of the row after its last forward
    block_length: int
    lost: Sequence[tuple[int, int, int]]  # committed, but behind a later end: position, token, in which forward
    steps: Sequence[Mapping[str, Any]]  # of every forward, may be missing
    phases: Sequence[Mapping[str, Any]]  # DiCo: of every forward
    piece_by_id: Mapping[str, str]
    finish_reason: str
    num_tokens: int

    def step(self, k: int) -> Mapping[str, Any]:
        """What was recorded of the k-th forward, from 1; nothing outside of the record."""
        return self.steps[k - 1] if 1 <= k <= len(self.steps) else {}

    def end(self, k: int) -> int:
        """One past the last position of the row after the k-th forward."""
        if k < len(self.steps):
            return self.steps[k]["end"]
        return self.last_end

    def block(self, k: int) -> tuple[int, int]:
        """The open range of the k-th forward, at step 0 of the first: first position, one past the last."""
        if k > self.nfe:
            return 0, 0
        first, behind = self.step(max(k, 1)).get("block", (0, len(self.tokens)))
        return first, min(behind, self.end(k - 1) if k else len(self.tokens))

    def cells(self, k: int) -> list[Cell]:
        """The canvas at step k."""
        step, end, (first, behind) = self.step(k), self.end(k), self.block(k)
        phase = self.phases[k - 1] if 1 <= k <= len(self.phases) else {}
        seeds, clusters = set(phase.get("seeds", ())), phase.get("clusters_after", ())
        opening, closing = {a for a, _ in clusters}, {b for _, b in clusters}
        drafts = dict(zip(step.get("open", ()), step.get("draft", ()), strict=True))
        filtered = dict(zip(step.get("open", ()), step.get("filter", [None] * len(drafts)), strict=True))
        gone = {place: token for place, token, _ in step.get("retracted", ())}
        before = self._taken_back_later(k)
        cells = []
        for place, committed in enumerate(self.commit_step):
            text = self.text(place)
            if place >= end:
                state = State.CUT
            elif 0 < committed <= k:
                state = State.NOW if committed == k else State.EARLIER
            elif place in before:
                token, since = before[place]
                state, text = State.NOW if since == k else State.EARLIER, self.text_of(token)
            elif place in gone:
                state, text = State.RETRACTED, self.text_of(gone[place])
            elif self.shows_drafts and place in drafts:
                state, text = State.REJECTED, self.text_of(drafts[place])
            else:
                state = State.MASKED
            cells.append(
                Cell(
                    state,
                    text,
                    is_open=first <= place < behind,
                    is_seed=place in seeds,
                    opens_cluster=place in opening,
                    closes_cluster=place in closing,
                    filter=filtered.get(place),
                )
            )
        return cells

    def counts(self, k: int) -> Counts:
        """The numbers of step k; behind the last forward, those of the last."""
        k, cells = min(k, self.nfe), self.cells(k)
        states = [cell.state for cell in cells]
        masks = sum(state in (State.MASKED, State.REJECTED, State.RETRACTED) for state in states)
        written = sum(state in (State.NOW, State.EARLIER) for state in states)
        now = [c for c, step in zip(self.confidence, self.commit_step, strict=True) if k and step == k]
        return Counts(
            forward=k,
            committed=states.count(State.NOW),
            masks_left=masks,
            tokens_per_forward=written / k if k else 0.0,
            least=min(now, default=None),
            mean=sum(now) / len(now) if now else None,
        )

    @property
    def shows_drafts(self) -> bool:
        """Whether a draft that is not accepted is news: APD drafts far ahead of what it commits."""
        return self.decoder.get("policy") == "apd"

    def phase(self, k: int) -> str:
        """The phase of a forward, if its decoder has phases."""
        return self.phases[k - 1]["phase"] if 1 <= k <= len(self.phases) else ""

    def text(self, place: int) -> str:
        """The text of the final token, or a sign for one that is no text."""
        return SPECIAL if self.tokens[place] in self.special_ids else self.pieces[place]

    def text_of(self, token: int) -> str:
        """The text of any token that was proposed or taken back."""
        return SPECIAL if token in self.special_ids else self.piece_by_id.get(str(token), f"<{token}>")

    def _taken_back_later(self, k: int) -> dict[int, tuple[int, int]]:
        """Positions that hold a token at step k which is not there at the end: the token, since which forward."""
        later = [what for step in reversed(self.steps[k:]) for what in step.get("retracted", ())]
        return {place: (token, since) for place, token, since in [*self.lost, *later] if since <= k}


def read(path: Path, *, label: str) -> list[Trace]:
    """The traces of an output file.

    Args:
        path: of the JSONL file.
        label: of its decoder; empty: taken from the trace.

    Raises:
        UsageError: there is none, or a line is no trace.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # texts may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"command line: expected an output with traces, got {str(path)!r} ({reason})") from None
    traces = [_of_line(line, where=f"{path}:{number}", label=label) for number, line in enumerate(lines, 1)]
    return traces


def _of_line(line: str, *, where: str, label: str) -> Trace:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected a JSON object, got {line[:40]!r}")
    if "pieces" not in row and "output_ids" in row:
        raise UsageError(f"{where}: expected a line of a run with output.trace=true, got one without a trace")
    try:
        return from_row(row, label=label)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{where}: expected a line of a run with output.trace=true, got {got}") from None


def from_row(row: Mapping[str, Any], *, label: str = "") -> Trace:
    """The trace in an output line.

    Args:
        row: the line.
        label: of the decoder; empty: its policy and cache.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: it is none.
    """
    tokens = [int(token) for token in row["output_ids"]]
    special_ids = frozenset(int(token) for token in row.get("special_ids", []))
    pieces = [f"<{token}>" for token in tokens] if row["pieces"] is None else list(map(str, row["pieces"]))
    decoder = dict(row.get("decoder", {}))
    trace = Trace(
        id=str(row["id"]),
        prompt=str(row.get("prompt_text") or row.get("prompt_ids", "")),
        label=label or label_of(decoder),
        decoder=decoder,
        nfe=int(row["nfe"]),
        tokens=tokens,
        pieces=pieces,
        special_ids=special_ids,
        commit_step=[int(step) for step in row["commit_step"]],
        confidence=[float(c) for c in row["confidence"]],
        last_end=int(row["end"]),
        block_length=int(row["block_length"]),
        lost=[_commit(what) for what in row.get("lost", [])],
        steps=[_checked_step(step) for step in row.get("steps", [])],
        phases=[_checked_phase(phase) for phase in row.get("forwards", [])],
        piece_by_id={str(token): str(piece) for token, piece in row.get("piece_by_id", {}).items()},
        finish_reason=str(row["finish_reason"]),
        num_tokens=int(row["num_tokens"]),
    )
    lengths = {len(each) for each in (trace.tokens, trace.pieces, trace.commit_step, trace.confidence)}
    if len(lengths) > 1:
        raise ValueError(f"lists of {', '.join(map(str, sorted(lengths)))} positions")
    return trace


def label_of(decoder: Mapping[str, Any]) -> str:
    """The decoder in a few words."""
    parts = [str(decoder.get("policy", "decoder"))]
    parts += [f"{decoder['cache']} cache"] if decoder.get("cache", "none") != "none" else []
    parts += [f"{decoder['blocks']} blocks"] if decoder.get("blocks", "aligned") != "aligned" else []
    parts += [f"stop {decoder['stop']}"] if decoder.get("stop", "none") != "none" else []
    return ", ".join(parts)


def _checked_step(step: Mapping[str, Any]) -> dict[str, Any]:
    """A forward, with nothing but the numbers that are known."""
    first, behind = map(int, step["block"])
    places = [int(place) for place in step["open"]]
    told: dict[str, Any] = {"block": (first, behind), "end": int(step["end"]), "open": places}
    told["draft"] = [int(token) for token in step["draft"]]
    for name in ("confidence", "filter"):
        if name in step:
            told[name] = [None if x is None else float(x) for x in step[name]]
    if any(len(told.get(name, places)) != len(places) for name in ("draft", "confidence", "filter")):
        raise ValueError("a forward with lists of different lengths")
    if retracted := step.get("retracted"):
        told["retracted"] = [_commit(each) for each in retracted]
    return told


def _commit(what: Sequence[Any]) -> tuple[int, int, int]:
    """Position, token, and forward in which it was committed."""
    place, token, since = map(int, what)
    return place, token, since


def _checked_phase(phase: Mapping[str, Any]) -> dict[str, Any]:
    clusters = [tuple(map(int, each)) for each in phase["clusters_after"]]
    if any(len(each) != 2 for each in clusters):
        raise ValueError("a cluster without first and last position")
    return {"phase": str(phase["phase"]), "seeds": list(map(int, phase["seeds"])), "clusters_after": clusters}
