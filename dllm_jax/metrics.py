"""The metrics of a job: counts, seconds, and what they were measured with."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jax

from dllm_jax.config import Config
from dllm_jax.data.tally import PHASE, Tally
from dllm_jax.decoding.state import DecodeResult, Timing
from dllm_jax.models.model import Model
from dllm_jax.version import __version__


@dataclasses.dataclass
class Decoded:
    """What was decoded in this run."""

    samples: int = 0
    tokens: int = 0  # before the end of text
    iterations: int = 0
    columns: int = 0  # see `DecodeResult`
    timing: Timing = dataclasses.field(default_factory=lambda: Timing(0.0, 0.0, 0, 0))

    def add(self, result: DecodeResult) -> None:
        """Adds what a batch gave."""
        self.samples += len(result.nfe_B)
        self.tokens += int(result.num_tokens_B.sum())
        self.iterations += result.iterations
        self.columns += result.columns
        self.timing += result.timing


def counts(tally: Tally, decoded: Decoded, *, gen_length: int) -> dict[str, Any]:
    """Tokens, forwards and seconds.

    Args:
        tally: of all rows.
        decoded: in this run, to which seconds, iterations, columns and rates belong.
        gen_length: tokens of a row.
    """
    sums, seconds = tally.total, decoded.timing.decode_seconds
    by_phase = {name.removeprefix(PHASE): count for name, count in sums.items() if name.startswith(PHASE)}
    return {
        "tokens_per_forward": sums["num_tokens"] / sums["nfe"],
        "committed_per_forward": sums["committed"] / sums["nfe"],
        "tokens_per_second": decoded.tokens / seconds if seconds else None,
        "canvas_tokens_per_second": decoded.samples * gen_length / seconds if seconds else None,
        "num_samples": sums["rows"],
        "num_tokens": sums["num_tokens"],
        "nfe_sum": sums["nfe"],
        "nfe_mean": sums["nfe"] / sums["rows"],
        "num_errors": sums["errors"],
        **({"forwards_by_phase": by_phase} if by_phase else {}),
        "timed_samples": decoded.samples,
        "iterations": decoded.iterations,
        "columns": decoded.columns,
        **dataclasses.asdict(decoded.timing),
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


def places(config: Config) -> str:
    """Where the results of a job are, for a reader."""
    output = config.output
    where = output.path
    if output.shard_lines and output.shards == "leave":
        path = PurePath(output.path)
        where = f"{path.stem}-*{path.suffix} beside {output.path}"
    return f"results in {where}, metrics in {output.path}.metrics.json"
