"""The small files of a checkpoint folder, and how a folder comes into being: whole or not at all."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_jax import hosts
from dllm_jax.errors import UsageError, naming
from dllm_jax.models import registry, sdar
from dllm_jax.models.fields import token_ids
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.places import folder_obstacle

# What travels with the weights besides config.json: the tokenizer, and code for other frameworks (never run here).
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
GENERATION = "generation_config.json"
CODE = (GENERATION, "*.py")
COMPANIONS = (*TOKENIZER, *CODE)
SIZES = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_length")
ENDS, PAD = ("eos_token_id", "eot_token_id"), "pad_token_id"  # fields of both files
MOST, MOST_POSITIONS = 2**20, 2**31 - 1  # of a size, so that no product of them overflows
NAMES_IN_ERRORS = 8
PARTIAL, SUFFIX_LENGTH = "partial", 8  # TARGET.partial-1234abcd becomes TARGET when it is complete
REMOVALS, REMOVAL_SECONDS = 50, 0.1
IN_FLIGHT_BYTES = 2**30  # of host memory, beside the arrays themselves, that reading or writing weights may take
ADAPTER = "adapter_config.json"  # of a LoRA adapter
MARKS = ("config.json", "filter.safetensors", ADAPTER)  # one of them is in every folder that we write


def abbreviate(names: list[str]) -> str:
    """The names in one line, the first few if there are many."""
    more = len(names) - NAMES_IN_ERRORS
    return ", ".join(names[:NAMES_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups: in order, as many as fit into a number of bytes, at least one."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: the file cannot be read or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: expected a readable file, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def read_config(folder: Path) -> TransformerConfig:
    """The model that a folder's config.json describes, with the end tokens of the generation_config.json beside it.

    Raises:
        UsageError: no such file, a malformed one, or a model we cannot build.
    """
    path, generation_path = folder / "config.json", folder / GENERATION
    fields = _read_fields(folder)
    generation = read_json(generation_path) if generation_path.is_file() else {}
    if fields.get("eos_token_id") is None:
        fields["eos_token_id"] = generation.get("eos_token_id")
    if fields.get("mask_token_id") is None:
        fields["mask_token_id"] = _tokenizers_mask(folder)
    try:
        config = registry.parse_config(fields)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{path}: expected numbers that describe a model, got {error}") from error
    for name in SIZES:
        size, most = getattr(config, name), MOST_POSITIONS if name == "max_length" else MOST
        if type(size) is not int or not 1 <= size <= most:
            raise UsageError(f"{path}: expected a positive whole number up to {most} for {name}, got {size!r}")
    if config.head_dim % 2:
        raise UsageError(f"{path}: expected an even head_dim (rotary pairs), got {config.head_dim}")
    if not 0 <= config.norm_eps < math.inf:
        raise UsageError(f"{path}: expected a number of at least 0 for rms_norm_eps, got {config.norm_eps}")
    if config.tied_embeddings not in (None, True, False):
        raise UsageError(f"{path}: expected true or false for tied embeddings, got {config.tied_embeddings!r}")
    known, more = (_special_ids(file, config.vocab_size) for file in ((path, fields), (generation_path, generation)))
    if config.eos_id == config.mask_id:
        raise UsageError(f"{path}: expected another eos_token_id than the mask_token_id, got {config.eos_id} for both")
    named = {token for ids in (known, more) for name in ENDS for token in ids[name]}
    others = {*config.other_end_ids, *named} - {config.eos_id}
    pads = {*known[PAD], *more[PAD]} - {config.eos_id}
    return dataclasses.replace(config, other_end_ids=tuple(sorted(others)), pad_ids=tuple(sorted(pads)))


def _read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json; of SDAR also the block length, which its releases have in their name."""
    fields = read_json(folder / "config.json")
    block = sdar.block_of(str(folder)) if str(fields.get("model_type")).startswith("sdar") else None
    return {"block_size": block} | fields if block else fields


def _tokenizers_mask(folder: Path) -> int | None:
    """The id of the token that the tokenizer beside a model calls its mask, in any brackets; None: no such one."""
    settings, added = (folder / name for name in ("tokenizer_config.json", "added_tokens.json"))
    tokens = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    named = {str(token.get("content")): id for id, token in tokens.items()} if tokens else {}
    named |= read_json(added) if added.is_file() else {}
    ids = {int(id) for name, id in named.items() if name.strip("<|>[]").lower() == "mask"}
    return ids.pop() if len(ids) == 1 else None


def _special_ids(file: tuple[Path, Mapping[str, Any]], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The ids in the fields of a file that name special tokens, all of them in the vocabulary."""
    path, fields = file
    try:
        ids = {name: token_ids(fields, name, file=path.name) for name in (*ENDS, PAD, "mask_token_id")}
    except UsageError as error:
        raise UsageError(f"{path.parent}: {error}") from error
    for name, tokens in ids.items():
        if any(token >= vocab_size for token in tokens):
            raise UsageError(f"{path}: expected {name} in the vocabulary of {vocab_size}, got {max(tokens)}")
    return ids


def copy_companions(source: Path, target: Path, *, patterns: tuple[str, ...] = COMPANIONS) -> None:
    """Copies the tokenizer and its like from one checkpoint folder to another."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def write_config(source: Path, target: Path, *, dtype: str, changes: Mapping[str, Any] | None = None) -> None:
    """Copies config.json, with the dtype of the weights beside it where it names one, and fields that are others."""
    fields = _read_fields(source) | dict(changes or {})
    fields |= {name: dtype for name in ("torch_dtype", "dtype") if name in fields}
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def check_new_folder(target: Path, *, overwrite: bool, field: str = "--target", switch: str = "--overwrite") -> None:
    """Refuses a folder that exists and may not be replaced, or cannot be made.

    Args:
        target: the folder to write.
        overwrite: a checkpoint that is there may be replaced.
        field: the setting that names the target, for errors.
        switch: what allows to replace it, for errors.

    Raises:
        UsageError: why not.
    """
    try:
        got = folder_obstacle(target.with_name(f"{target.name}.{PARTIAL}-{'0' * SUFFIX_LENGTH}"))
        got = got or folder_obstacle(target)
    except OSError as error:
        got = error.strerror or str(error)
    if got:
        raise UsageError(f"{field}: expected a place to write {target}, got one where that cannot be done ({got})")
    if target.exists() and not overwrite:
        raise UsageError(f"{field}: expected a folder that does not exist, or {switch}, got {target}")
    if target.exists() and not any((target / name).is_file() for name in MARKS):
        raise UsageError(
            f"{field}: expected a checkpoint folder to overwrite, got {target} without {' or '.join(MARKS)}"
        )


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place if the block succeeds and vanishes if it does not.

    Of several processes the first makes and renames it; the others get its name.

    Raises:
        UsageError: `target` exists and may not be replaced, or its parent cannot be written to.
        OSError: naming `target`; nothing is left there.
    """
    suffix = hosts.from_first(lambda: uuid.uuid4().hex[:SUFFIX_LENGTH])
    temporary, old = (target.with_name(f"{target.name}.{kind}-{suffix}") for kind in (PARTIAL, "old"))

    def make() -> None:
        check_new_folder(target, overwrite=overwrite)
        temporary.mkdir(parents=True)

    hosts.from_first(make)
    if not hosts.is_first():
        yield temporary
        return
    try:
        with naming(target):
            yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(temporary)
    shutil.rmtree(old, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of a failed write may still be writing."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(REMOVAL_SECONDS)
