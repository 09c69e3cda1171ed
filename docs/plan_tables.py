"""Makes the tables of docs/programs.md and of "What fits where" in the README: decode.plan, once for every row.

usage: python docs/plan_tables.py programs|fits      (from the root of a clone with the extra tpu; minutes)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dllm_jax.bench.plan import PARTS
from dllm_jax.bench.report import markdown_table
from dllm_jax.checkpoints.filters import save_filter
from dllm_jax.models import qwen2
from dllm_jax.models.filter import ConfidenceFilter, FilterConfig
from dllm_jax.models.presets import PRESETS

ROOT = Path(__file__).parents[1]
MODELS = ("llada_8b", "dream_7b")
GIB, MIB = 2**30, 2**20


class Decode(NamedTuple):
    """A decode of docs/programs.md."""

    name: str
    config: str  # an experiment
    settings: tuple[str, ...]


DECODES = (
    Decode("threshold, dual", "threshold", ("decode.cache=dual",)),
    Decode("threshold, prefix", "threshold", ("decode.cache=prefix",)),
    Decode("threshold, none", "threshold", ("decode.cache=none",)),
    Decode("learn2pd + eot, 1,024 tokens", "learn2pd", ("decode.gen_length=1024", "filter.path={filter}")),
    Decode("dico", "dico", ("decode.block_length=32",)),
    Decode("apd, window, Qwen2.5-0.5B", "apd", ("verifier.path={verifier}",)),
)
OTHER_MACHINES = ("v6e:2x4", "v5p:2x2x1")
PLACES = (  # what, topology, settings
    ("v5e-1, int8", "v5e:1x1", "int8"),
    ("v5e-4", "v5e:2x2", ""),
    ("v5e-8", "v5e:2x4", ""),
    ("v6e-4", "v6e:2x2", ""),
    ("H100 (estimate)", "h100", ""),
)
BATCHES = (1, 8, 64)


def plan(folder: Path, model: str, decode: Decode, topology: str, *more: str) -> dict[str, Any]:
    """The JSON of decode.plan.

    Args:
        folder: for a filter and a verifier's config.json, and for the result.
        model: a preset.
        decode: what to compile.
        topology: for what.
        more: further settings.
    """
    verifier, filter_, path = folder / "verifier", folder / "filter", folder / "plan.json"
    if not filter_.exists():
        verifier.mkdir()
        (verifier / "config.json").write_text(json.dumps(qwen2.config_fields(PRESETS["qwen2_0_5b"])))
        filter_.mkdir()
        save_filter(filter_, nnx.state(ConfidenceFilter(FilterConfig(block_length=32), rngs=nnx.Rngs(0))))
    path.unlink(missing_ok=True)
    settings = [setting.format(verifier=verifier, filter=filter_) for setting in decode.settings]
    flags = [
        f"--config.{setting}"
        for setting in (
            f"model.preset={model}",
            "decode.gen_length=256",
            "decode.batch_size=8",
            "model.dtype=bfloat16",
            *settings,
            f"plan.topology={topology}",
            f"output.path={path}",
            *more,
        )
    ]
    command = [sys.executable, "-m", "decode.plan", f"--config={decode.config}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not path.exists():
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(path.read_text())


def programs(folder: Path) -> None:
    """Prints the table of docs/programs.md."""
    names = ("weights", "temporaries", "code", "of")
    table = markdown_table(
        "model",
        "decode",
        "machine",
        "mesh",
        *(f"{name} GiB" for name in names),
        "compile s",
        "weight copies",
        "cache copies",
        "full MiB moved",
        "full floor ms",
        "cached MiB moved",
        "cached floor ms",
    )
    rows = [(model, decode, "v5e:2x4") for model in MODELS for decode in DECODES]
    rows += [(MODELS[0], DECODES[0], machine) for machine in OTHER_MACHINES]
    for model, decode, machine in track(rows, description="programs"):
        made = plan(folder, model, decode, machine)
        (program,) = made["programs"]
        loops = program["loops"]
        if not made["fits"]:
            raise SystemExit(f"{model}, {decode.name} does not fit {machine}: {program}")
        steps = [loops.get(step) for step in ("full", "cached")]
        moved = [step and sum(each["bytes"] for each in step["collectives"].values()) / MIB for step in steps]
        cells = [cell for step, mib in zip(steps, moved, strict=True) for cell in (mib, step and step["floor_ms"])]
        sizes = [program["argument_bytes"], program["temp_bytes"], program["code_bytes"], made["usable_per_device"]]
        table.add_row(
            model,
            decode.name,
            machine,
            _mesh(made),
            *(f"{size / GIB:.2f}" for size in sizes),
            f"{program['compile_seconds']:.0f}",
            *(str(sum(step[kind] for step in steps if step)) for kind in ("weight_copies", "cache_copies")),
            *("-" if cell is None else f"{cell:.1f}" for cell in cells),
        )
    _print(table)


def fits(folder: Path) -> None:
    """Prints the table "What fits where" of the README."""
    table = markdown_table("machine", "model", *(f"batch {batch}" for batch in BATCHES))
    rows = [(place, model) for place in PLACES for model in MODELS]
    for (name, topology, quantize), model in track(rows, description="places"):
        cells = []
        for batch in BATCHES:
            more = (f"decode.batch_size={batch}", f"model.quantize={quantize}")
            made = plan(folder, model, DECODES[0], topology, *more)
            (program,) = made["programs"]
            sizes = [program[part] for part in PARTS]
            total = "too much" if None in sizes else f"{sum(sizes) / GIB:.1f}"
            cells.append(f"{total} on {_mesh(made)}" if made["fits"] else f"no ({total})")
        table.add_row(name, model, *cells)
    _print(table)


def _mesh(made: dict[str, Any]) -> str:
    return ",".join(map(str, made["mesh"].values()))


def _print(table: Table) -> None:
    console = Console(highlight=False)
    console.width = 240
    console.print(table)


if __name__ == "__main__":
    chosen = {"programs": programs, "fits": fits}.get(" ".join(sys.argv[1:]))
    if chosen is None:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as place:
        chosen(Path(place))
