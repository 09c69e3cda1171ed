"""Converts a checkpoint: python -m dllm_jax.checkpoints.convert --source=DIR --target=DIR.

Options: --to=hf, --dtype=bfloat16, --quantize=int8, --overwrite. The source is a Hugging Face folder, a converted
folder, or the name of a bundled checkpoint. The target is an Orbax checkpoint with config.json, tokenizer and a
manifest of checksums beside it, or a Hugging Face folder. It appears when it is complete; an interrupted run leaves at
most TARGET.partial-*, and an overwritten target stays until then.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from rich import progress

from dllm_jax import cli
from dllm_jax.checkpoints import files, hf, layout, store
from dllm_jax.checkpoints.commands import define_path, execute
from dllm_jax.checkpoints.load import PARAMS, load_model, resolve
from dllm_jax.checkpoints.manifest import write_manifest
from dllm_jax.errors import UsageError
from dllm_jax.models.quantize import FORMATS
from dllm_jax.places import check_room, only_writer

TARGETS = ("orbax", "hf")
DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    parameters: int
    dtype: str
    file_bytes: int
    seconds: float


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    dtype: str,
    overwrite: bool,
    quantize: str = "",
    track: hf.Track = iter,
) -> Converted:
    """Writes a checkpoint in another format or dtype.

    Args:
        source: a Hugging Face or converted folder, or the name of a bundled checkpoint.
        target: the folder to write.
        to: "orbax" or "hf".
        dtype: of the weights written; "keep" is the source's.
        overwrite: replace an existing target, once the new one is complete.
        quantize: "int8" for matrices in 8 bits (`models/quantize.py`), as only our own format holds them.
        track: wraps the parameters read (and, for "hf", written), to show progress.

    Raises:
        UsageError: a source that cannot be read, or a target that may not be written.
        OSError: the target's disk is full, or the like.
    """
    start = time.perf_counter()
    if to == "hf" and quantize:
        raise UsageError(f"--quantize: expected none with --to=hf, got {quantize}")
    source, target = resolve(source, field="--source"), Path(target).resolve()
    if source.resolve().is_relative_to(target):
        raise UsageError(f"--target: expected a folder apart from --source {source}, got {target}")
    files.check_new_folder(target, overwrite=overwrite)
    with only_writer(target, field="--target"), files.new_folder(target, overwrite=overwrite) as folder:
        model = load_model(source, dtype=dtype, quantize=quantize, track=track)
        params = layout.flatten(model.params)
        check_room(folder, sum(param.nbytes for param in params.values()))
        if to == "hf":
            hf.export_hf(model, folder, track=track)
        else:
            store.save_params(folder / PARAMS, params)
            files.write_config(source, folder, dtype=model.dtype.name)
            files.copy_companions(source, folder)
            write_manifest(folder)
    return Converted(
        folder=target,
        parameters=sum(param.size for param in params.values()),
        dtype=model.dtype.name,
        file_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        seconds=time.perf_counter() - start,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command (program name first in `argv`) and returns its exit code."""
    values = flags.FlagValues()
    define_path("source", "folder to read, or the name of a bundled checkpoint", values)
    define_path("target", "folder to write", values)
    flags.DEFINE_enum("to", TARGETS[0], TARGETS, "format of the target", flag_values=values)
    flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "dtype of the weights written", flag_values=values)
    flags.DEFINE_enum("quantize", "", FORMATS, "matrices in fewer bits, one scale per channel", flag_values=values)
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
        track=lambda paths: progress.track(paths, description="parameters"),
    )
    size = f"{done.parameters:,} parameters in {done.dtype}, {done.file_bytes:,} bytes"
    print(f"{done.folder}: {size}, {done.seconds:.1f} s")


if __name__ == "__main__":
    cli.leave(main(sys.argv))
