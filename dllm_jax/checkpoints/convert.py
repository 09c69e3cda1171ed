"""Converts a checkpoint: python -m dllm_jax.checkpoints.convert --source=DIR --target=DIR.

Options: --to=hf, --dtype=bfloat16, --quantize=int8, --adapter=DIR (merged into the weights), --overwrite. The source is
a Hugging Face folder, a converted folder, or the name of a bundled checkpoint. The target is an Orbax checkpoint with
config.json, tokenizer and a manifest of checksums beside it, or a Hugging Face folder. It appears when it is complete;
an interrupted run leaves at most TARGET.partial-*, and an overwritten target stays until then.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags
from rich import progress

from dllm_jax import cli
from dllm_jax.checkpoints import adapters, files, hf, store
from dllm_jax.checkpoints.commands import define_path, execute
from dllm_jax.checkpoints.load import PARAMS, Checkpoint, open_checkpoint, resolve
from dllm_jax.checkpoints.manifest import write_manifest
from dllm_jax.errors import UsageError
from dllm_jax.memory import peak_bytes
from dllm_jax.mesh import make_mesh
from dllm_jax.models.quantize import FORMATS
from dllm_jax.places import check_room, only_writer

TARGETS = ("orbax", "hf")
DTYPES = ("keep", "float32", "bfloat16", "float16")
GROUP_BYTES = 2**26  # less is not worth a write of its own


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    parameters: int
    dtype: str
    file_bytes: int
    host_bytes: int  # the most memory that was in use beside what the process held before
    seconds: float


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    dtype: str,
    overwrite: bool,
    quantize: str = "",
    adapter: str | Path = "",
    track: hf.Track = iter,
) -> Converted:
    """Writes a checkpoint in another format or dtype; of its parameters a few are in memory at once.

    Args:
        source: a Hugging Face or converted folder, or the name of a bundled checkpoint.
        target: the folder to write.
        to: "orbax" or "hf".
        dtype: of the weights written; "keep" is the source's.
        overwrite: replace an existing target, once the new one is complete.
        quantize: "int8" for matrices in 8 bits (`models/quantize.py`), as only our own format holds them.
        adapter: the folder of a LoRA adapter in PEFT's layout, merged into the weights that are written.
        track: wraps the parameters that are read and written, to show progress.

    Raises:
        UsageError: a source that cannot be read, or a target that may not be written.
        OSError: the target's disk is full, or the like.
    """
    start, before = time.perf_counter(), peak_bytes(reset=True)
    if to == "hf" and quantize:
        raise UsageError(f"--quantize: expected none with --to=hf, got {quantize}")
    source, target = resolve(source, field="--source"), Path(target).resolve()
    adapter = adapters.resolve(adapter, field="--adapter") if adapter else ""
    for name, read in {"--source": source, "--adapter": adapter}.items():
        if read and Path(read).resolve().is_relative_to(target):
            raise UsageError(f"--target: expected a folder apart from {name} {read}, got {target}")
    files.check_new_folder(target, overwrite=overwrite)
    with only_writer(target, field="--target"), files.new_folder(target, overwrite=overwrite) as folder:
        mesh = make_mesh(data=1)
        checkpoint = open_checkpoint(
            source,
            dtype=dtype,
            quantize=quantize,
            adapter=adapter,
            mesh=mesh,
            verify=True,
            track=iter,
            field="--source",
        )
        wanted, config = checkpoint.assembly.wanted, checkpoint.assembly.config
        check_room(folder, sum(map(store.nbytes, wanted.values())))
        if to == "hf":
            hf.refuse_quantized(config)
            pairs = (pair for group in _groups(checkpoint, limit=1, track=track) for pair in group.items())
            hf.write_params(pairs, folder, config=config, shapes=wanted)
        else:
            largest = max(map(store.nbytes, checkpoint.assembly.shapes.values()))
            store.save_by_groups(folder / PARAMS, _groups(checkpoint, limit=max(largest, GROUP_BYTES), track=track))
        files.write_config(source, folder, dtype=checkpoint.dtype.name)
        files.copy_companions(source, folder)
        if to != "hf":
            write_manifest(folder)
    return Converted(
        folder=target,
        parameters=sum(shape.size for shape in wanted.values()),
        dtype=checkpoint.dtype.name,
        file_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        host_bytes=peak_bytes() - before,
        seconds=time.perf_counter() - start,
    )


def _groups(checkpoint: Checkpoint, *, limit: int, track: hf.Track) -> Iterator[dict[str, jax.Array]]:
    """The parameters to write, read as they are asked for: as many at once as are stored in `limit` bytes, or one."""
    shapes = checkpoint.assembly.shapes
    ends = {names[-1] for names in files.grouped({name: store.nbytes(x) for name, x in shapes.items()}, limit)}
    coming = checkpoint.params(0)
    group: dict[str, jax.Array] = {}
    for name in track(list(shapes)):
        group |= checkpoint.assembly.formed(*next(coming))
        if name in ends:
            yield group
            group = {}  # and it is gone, if it is no longer needed there


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    values = flags.FlagValues()
    define_path("source", "folder to read, or the name of a bundled checkpoint", values)
    define_path("target", "folder to write", values)
    flags.DEFINE_enum("to", TARGETS[0], TARGETS, "format of the target", flag_values=values)
    flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "dtype of the weights written", flag_values=values)
    flags.DEFINE_enum("quantize", "", FORMATS, "matrices in fewer bits, one scale per channel", flag_values=values)
    define_path("adapter", "folder of a LoRA adapter in PEFT's layout, merged into the weights", values)
    flags.DEFINE_boolean("overwrite", False, "replace an existing target", flag_values=values)
    return execute(_convert, argv, values=values, usage=f"{__doc__}\n")


def _convert(values: flags.FlagValues, arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"command line: expected only --flags, got {arguments[0]!r}")
    for name in ("source", "target"):
        if not values[name].value:
            raise UsageError(f"--{name}: expected a folder, got none")
    jax.config.update("jax_platforms", "cpu")  # a conversion computes nothing
    done = convert(
        values.source,
        values.target,
        to=values.to,
        dtype=values.dtype,
        overwrite=values.overwrite,
        quantize=values.quantize,
        adapter=values.adapter,
        track=lambda paths: progress.track(paths, description="parameters"),
    )
    size = f"{done.parameters:,} parameters in {done.dtype}, {done.file_bytes:,} bytes"
    print(f"{done.folder}: {size}, {done.seconds:.1f} s, {done.host_bytes / 1e9:.2f} GB of host memory")


if __name__ == "__main__":
    cli.leave(main(sys.argv))
