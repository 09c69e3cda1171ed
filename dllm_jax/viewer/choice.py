"""Which traces are shown together: those of the same prompt, one per decoder."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dllm_jax.errors import UsageError
from dllm_jax.viewer.trace import Trace, read

MOST_DECODERS = 4


class Race(NamedTuple):
    """A prompt, decoded by up to four decoders."""

    id: str
    prompt: str
    traces: tuple[Trace, ...]

    @property
    def forwards(self) -> int:
        """Of the slowest."""
        return max(trace.nfe for trace in self.traces)


def races(files: Sequence[Path], *, labels: Sequence[str], ids: Sequence[str], most: int) -> tuple[list[Race], int]:
    """The prompts that all files have, in the order of the first.

    Args:
        files: outputs with traces, one per decoder.
        labels: of the decoders, or none.
        ids: of the prompts wanted; none: all.
        most: prompts at most.

    Returns:
        The prompts, and how many were left out because there are too many.

    Raises:
        UsageError: too many files, an id that is missing, or two prompts under one id.
    """
    if not 1 <= len(files) <= MOST_DECODERS:
        raise UsageError(f"command line: expected 1 to {MOST_DECODERS} outputs with traces, got {len(files)}")
    if labels and len(labels) != len(files):
        raise UsageError(f"--labels: expected one per output ({len(files)}), got {len(labels)}")
    given = labels or [""] * len(files)
    return put_together(
        [read(file, label=label) for file, label in zip(files, given, strict=True)],
        names=[file.stem for file in files],
        ids=ids,
        most=most,
    )


def put_together(
    outputs: Sequence[Sequence[Trace]], *, names: Sequence[str], ids: Sequence[str], most: int
) -> tuple[list[Race], int]:
    """See `races`; `names` tell decoders of the same label apart."""
    twice = {label for label, count in Counter(traces[0].label for traces in outputs).items() if count > 1}
    by_id: list[dict[str, Trace]] = []
    for traces, name in zip(outputs, names, strict=True):
        renamed = [replace(t, label=f"{t.label} ({name})") if t.label in twice else t for t in traces]
        by_id.append({trace.id: trace for trace in renamed})
    wanted = list(ids) or [key for key in by_id[0] if all(key in each for each in by_id)]
    if missing := next((key for key in wanted if not all(key in each for each in by_id)), None):
        raise UsageError(f"--ids: expected ids that every output has, got {missing!r}")
    if not wanted:
        raise UsageError("command line: expected outputs that share an id, got none in common")
    found = []
    for key in wanted[:most]:
        together = tuple(each[key] for each in by_id)
        if len({trace.prompt for trace in together}) > 1:
            raise UsageError(f"command line: expected the same prompt under id {key!r}, got different ones")
        found.append(Race(key, together[0].prompt, together))
    return found, len(wanted) - len(found)
