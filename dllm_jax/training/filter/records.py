"""What a filter learns from: the confidences of a block in one step, and which of its predictions were right."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dllm_jax.checkpoints.files import abbreviate, read_json
from dllm_jax.data.outputs import difference, replace_file
from dllm_jax.errors import UsageError
from dllm_jax.places import folder_obstacle
from dllm_jax.training.filter.config import MIN_PROMPTS

IDENTITY = "records.json"
HELD_OUT_SHARE = 0.1  # of the prompts: once for validation, once for the test
DTYPES = {
    "confidence_RQ": "float32",
    "correct_RQ": "bool",
    "masked_RQ": "bool",
    "prompt_R": "int32",
    "block_R": "int32",
    "step_R": "int32",
}


class Records(NamedTuple):
    """R steps of decoding, each with the Q positions of its block; `DTYPES` names the dtypes."""

    confidence_RQ: Float[np.ndarray, "R Q"]  # what `ConfidenceFilter` takes
    correct_RQ: Bool[np.ndarray, "R Q"]  # the token predicted here is the one of one-by-one decoding
    masked_RQ: Bool[np.ndarray, "R Q"]  # the position was still masked
    prompt_R: Int[np.ndarray, "R"]  # index of the prompt in the job
    block_R: Int[np.ndarray, "R"]  # index of the block in the answer
    step_R: Int[np.ndarray, "R"]  # index of the step in the block

    @property
    def size(self) -> int:
        """R."""
        return len(self.prompt_R)

    @property
    def block_length(self) -> int:
        """Q."""
        return self.confidence_RQ.shape[1]

    def take(self, rows: Bool[np.ndarray, "R"] | Int[np.ndarray, "N"]) -> "Records":
        """The records that a mask or indices choose."""
        return Records(*(array[rows] for array in self))


class Split(NamedTuple):
    """Records in three parts that share no prompt."""

    training: Records
    validation: Records
    test: Records


def outdated(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> str:
    """What records that are there have otherwise; "" if they are these, or if there are none.

    Args:
        folder: where they are, or would be.
        identity: section -> field -> value of what decides the records, or a part of it; JSON.
        overwrite: records of another identity may be discarded.

    Raises:
        UsageError: there are records of another identity, and `overwrite` is off; or the folder holds something else,
            or cannot be made.
    """
    found = read_json(folder / IDENTITY) if (folder / IDENTITY).exists() else {}
    got = folder_obstacle(folder.resolve())
    if got or (not found and folder.exists() and any(folder.iterdir())):
        told = f"{folder} ({got})" if got else folder
        raise UsageError(f"data.records_path: expected a folder of records, or a new or empty one, got {told}")
    change = difference(found, identity) if found else ""
    if change and not overwrite:
        raise UsageError(
            f"data.records_path: expected the records in {folder} to have the same settings, got {change} "
            "(output.overwrite=true discards them)"
        )
    return change


class RecordFolder:
    """Numbered shards of records, each written as a whole: what is there is complete. `records.json` says of what.

    Args:
        folder: where they are; made if it does not exist.
        identity: section -> field -> value of everything that decides the records; JSON.
        overwrite: records of another identity may be discarded.

    Raises:
        UsageError: there are records of another identity, and `overwrite` is off; or the folder holds something else,
            or cannot be made.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.folder, path = folder, folder / IDENTITY
        change = outdated(folder, identity, overwrite=overwrite)
        for shard in folder.glob("records-*.safetensors") if change else ():
            shard.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(identity, indent=2) + "\n")

    def path(self, shard: int, *, shards: int) -> Path:
        """The file of a shard, counted from 0."""
        return self.folder / f"records-{shard:05d}-of-{shards:05d}.safetensors"

    def missing(self, shards: int) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(shards) if not self.path(shard, shards=shards).exists()]

    def write(self, shard: int, records: Records, *, shards: int) -> None:
        """Writes a shard, or replaces it.

        Raises:
            UsageError: `read` would refuse the records.
        """
        path = self.path(shard, shards=shards)
        arrays = {name: np.ascontiguousarray(array) for name, array in records._asdict().items()}
        _check(arrays, path)
        replace_file(path, save(arrays))

    def read(self, shards: int) -> Records:
        """The records of all shards, in their order.

        Raises:
            UsageError: a shard is missing, damaged or of something else; the message names it.
        """
        parts: list[Records] = []
        for shard in range(shards):
            path = self.path(shard, shards=shards)
            records = _read(path)
            if parts and records.block_length != parts[0].block_length:
                raise UsageError(
                    f"{path}: expected blocks of {parts[0].block_length} positions as in the shards before, "
                    f"got {records.block_length}"
                )
            parts.append(records)
        return concatenate(parts)


def concatenate(parts: Sequence[Records]) -> Records:
    """The records of all parts; at least one part, all with the same block length."""
    return Records(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def split(records: Records, *, seed: int) -> Split:
    """Divides records by `split_prompts`.

    Raises:
        UsageError: too few prompts.
    """
    parts = split_prompts(records.prompt_R, seed=seed)
    return Split(*(records.take(np.isin(records.prompt_R, prompts)) for prompts in parts))


def split_prompts(prompt_R: Sequence[int] | Int[np.ndarray, "R"], *, seed: int) -> list[Int[np.ndarray, "N"]]:
    """Divides prompts: about 80% to learn from, 10% for validation and 10% for the test, at least one in each.

    Args:
        prompt_R: indices of prompts, in any order and number.
        seed: decides which go where; nothing else does.

    Returns:
        The indices of each part, ascending.

    Raises:
        UsageError: too few prompts.
    """
    prompts = np.unique(prompt_R)
    if len(prompts) < MIN_PROMPTS:
        raise UsageError(
            f"data.prompts: expected at least {MIN_PROMPTS} (to learn from, for validation and for the test), "
            f"got {len(prompts)}"
        )
    held_out = max(1, round(len(prompts) * HELD_OUT_SHARE))
    shuffled = np.random.default_rng(seed).permutation(prompts)
    return [np.sort(part) for part in np.split(shuffled, [-2 * held_out, -held_out])]


def _read(path: Path) -> Records:
    try:
        arrays = load(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: expected a readable file, got {error.strerror}") from None
    except (SafetensorError, LookupError, AttributeError) as error:  # the last two: a dtype that NumPy lacks
        raise UsageError(f"{path}: expected a complete safetensors file of records, got {error}") from None
    _check(arrays, path)
    return Records(**arrays)


def _check(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuses arrays that are no records."""
    if arrays.keys() != DTYPES.keys():
        got = abbreviate(sorted(arrays)) or "none"
        raise UsageError(f"{path}: expected the arrays {', '.join(DTYPES)}, got {got}")
    confidence_RQ = arrays["confidence_RQ"]
    if confidence_RQ.ndim != 2 or not confidence_RQ.shape[1]:
        raise UsageError(f"{path}: confidence_RQ: expected records of at least 1 position, got {confidence_RQ.shape}")
    sizes = dict(zip("RQ", confidence_RQ.shape, strict=True))
    for name, dtype in DTYPES.items():
        expected = f"{dtype} {[sizes[axis] for axis in name.rpartition('_')[2]]}"
        found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
        if found != expected:
            raise UsageError(f"{path}: {name}: expected {expected}, got {found}")
    outside = confidence_RQ[~((confidence_RQ >= 0) & (confidence_RQ <= 1))]
    if outside.size:
        raise UsageError(f"{path}: confidence_RQ: expected 0 to 1, got {outside[0]}")
