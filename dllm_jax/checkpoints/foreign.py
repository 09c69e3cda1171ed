"""Where a checkpoint is, and what looks like one but is not read: told in one line with what to do instead."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dllm_jax.checkpoints.files import TOKENIZER, abbreviate
from dllm_jax.errors import UsageError

POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # a pointer is never longer
READ = (".json", ".safetensors", ".jinja", ".txt")
ADAPTERS = ("adapter_config.json", "adapter_model.*")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz")
LEFT_BY_TRAINERS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_HUB = re.compile(r"(?:https://huggingface\.co/|hf://)?([\w-][\w.-]*/[\w-][\w.-]*?)(?:/tree/main)?/?")
_ADAPTED = re.compile(r"\b(lora|hada|lokr|ia3|oft|vera)_|\.base_layer\.|^base_model\.model\.|\.modules_to_save\.")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|weight\.(absmax|quant_map|nested_absmax|"
    r"quant_state.*)|weight_scale|weight_scale_inv|weight_packed|weight_zero_point|input_scale)$"
)
_HALF = "save the dequantised weights in bfloat16"
_MERGE = "merge it into the model and save the merged weights (in peft: merge_and_unload)"
_NAME = "or name its folder in model.adapter"


def snapshot(folder: Path, *, field: str) -> Path:
    """The files of the model in a folder of Hugging Face's cache (models--ORG--NAME); any other folder is itself.

    Args:
        folder: exists.
        field: the setting it came from, for the error.

    Raises:
        UsageError: the cache has no snapshot, or several and no `main`.
    """
    models = sorted(path.name for path in folder.glob("models--*"))
    if models and not (folder / "config.json").exists():
        raise UsageError(f"{field}: expected the folder of one model, got a cache with {abbreviate(models)}")
    if not (folder / "snapshots").is_dir() or (folder / "config.json").exists():
        return folder
    main = folder / "refs" / "main"
    commits = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    wanted = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if not wanted and len(commits) == 1:
        return folder / "snapshots" / commits[0]
    if wanted not in commits:
        told = f"{abbreviate(commits) or 'none'}{' (refs/main is ' + wanted + ': download again)' if wanted else ''}"
        raise UsageError(f"{field}: expected a cache folder with one snapshot or refs/main, got {told} in {folder}")
    return folder / "snapshots" / wanted


def hint(path: str) -> str:
    """What to do about a path that is no folder: "" or the end of an error line."""
    place = Path(path)
    if os.path.isfile(path):
        return f": a file, expected the folder that it is in, {place.parent}"
    name = _HUB.fullmatch(path)
    if name and not os.path.isdir(place.parent):
        repository = name[1]
        target = repository.partition("/")[2]
        return f" (weights are read from a local folder: hf download {repository} --local-dir {target})"
    return ""


def refuse_stand_ins(folder: Path, *, field: str) -> None:
    """Refuses a folder with pointers of git-lfs, or links to nothing, instead of files that may be read.

    Args:
        folder: of a checkpoint.
        field: the setting it came from; for tokenizer.path the weights may be pointers.

    Raises:
        UsageError: naming them.
    """
    patterns = TOKENIZER if field == "tokenizer.path" else ["*"]
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.suffix in READ})
    if broken := [path.name for path in paths if path.is_symlink() and not path.exists()]:
        told = f"{abbreviate(broken)} (download again)"
        raise UsageError(f"{field}: expected files in {folder}, got links to files that are not there: {told}")
    small = (path for path in paths if path.is_file() and path.stat().st_size <= POINTER_BYTES)
    pointers = [path.name for path in small if path.read_bytes().startswith(POINTER)]
    if pointers:
        raise UsageError(
            f"{field}: expected files in {folder}, got git-lfs pointers: {abbreviate(pointers)} (run git lfs pull)"
        )


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter, beside weights or alone: decoding without it would answer as another model.

    Raises:
        UsageError: there is one.
    """
    if found := _names(folder, ADAPTERS):
        beside = "beside the weights" if _names(folder, ["model*.safetensors", "*.bin"], but=found) else "alone"
        told = f"{abbreviate(found)} {beside}: {_MERGE}, {_NAME}"
        raise UsageError(f"{folder}: expected a model without adapter, got {told}")


def absent(folder: Path, *expected: str) -> UsageError:
    """The error for a folder without any of the files that are expected, with what it has instead."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{expected[0]}"))
    if pickled := _names(folder, PICKLED):
        told = f"{abbreviate(pickled)}: save the model as safetensors (in transformers: save_pretrained)"
    elif stray := _names(folder, ["*.safetensors"]):
        told = f"only {abbreviate(stray)} (download the folder again, as it is)"
    elif inner:
        told = f"folders with it: {abbreviate(inner)} (name the one you want)"
    else:
        told = "no such file"
    return UsageError(f"{folder}: expected {' or '.join(expected)}, got {told}")


def refuse_tensors(folder: Path, dtypes: Mapping[str, str], *, known: Mapping[str, object]) -> None:
    """Refuses tensors that are an adapter's, or quantised.

    Args:
        folder: for the error.
        dtypes: of every tensor by name, as safetensors names them.
        known: the dtypes that are read.

    Raises:
        UsageError: naming the tensors.
    """
    if adapted := [name for name in dtypes if _ADAPTED.search(name)]:
        raise UsageError(f"{folder}: expected merged weights, got those of an adapter: {abbreviate(adapted)}: {_MERGE}")
    if quantised := [name for name in dtypes if _QUANTISED.search(name)]:
        raise UsageError(f"{folder}: expected plain weights, got quantised ones: {abbreviate(quantised)}: {_HALF}")
    if odd := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in known]:
        raise UsageError(f"{folder}: expected tensors in {', '.join(known)}, got {abbreviate(odd)}: {_HALF}")


def _names(folder: Path, patterns: Sequence[str], *, but: Sequence[str] = ()) -> list[str]:
    """The files that match, but for what trainers leave beside a model."""
    found = {path.name for pattern in patterns for path in folder.glob(pattern)}
    return sorted(found - set(but) - LEFT_BY_TRAINERS)
