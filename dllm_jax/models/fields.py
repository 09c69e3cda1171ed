"""What the families share in reading a config.json."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_jax.errors import UsageError

BLOCK_FIELDS = ("block_size", "bd_size")  # how long the blocks of a mask are


def require(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses a config.json without the fields named.

    Raises:
        UsageError: naming those that are missing.
    """
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        hint = " (add the id of [MASK] to config.json)" if "mask_token_id" in missing else ""
        raise UsageError(f"config.json: expected the field(s) {', '.join(missing)}, got none{hint}")


def refuse_variants(fields: Mapping[str, Any], *, in_blocks: bool = False) -> None:
    """Refuses what would change the arithmetic of any family and is not built.

    Args:
        fields: of config.json.
        in_blocks: the family's mask is causal by blocks, and may say how long they are.

    Raises:
        UsageError: naming the field.
    """
    for name in ("quantization_config", "compression_config"):
        if found := fields.get(name):
            method = found.get("quant_method", found) if isinstance(found, Mapping) else found
            raise UsageError(
                f"config.json field {name}: expected none, got {method!r} (quantised weights are not read: dequantise "
                "the model and save it in bfloat16)"
            )
    for name in BLOCK_FIELDS:
        if not in_blocks and fields.get(name) is not None:
            raise UsageError(
                f"config.json field {name}: expected none (every position attends to the whole canvas), got "
                f"{fields[name]!r} (of block diffusion LLaDA2, SDAR and Fast-dLLM v2 are read)"
            )
    layers = fields.get("layer_types") or ()
    sliding = [kind for kind in layers if kind != "full_attention"]
    if sliding:
        raise UsageError(f"config.json field layer_types: expected only 'full_attention', got {sliding[0]!r}")


def rope_theta(fields: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies: `rope_theta`, in files of transformers 5 inside `rope_parameters`.

    Raises:
        UsageError: there is none, or the frequencies are scaled.
    """
    theta = fields.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default" or any(rope.get(key, 1) != 1 for key in ("factor", "partial_rotary_factor")):
            raise UsageError(
                f"config.json field {name}: expected none (plain rotary positions; scaled ones are not supported), "
                f"got {dict(rope) if isinstance(rope, Mapping) else rope!r}"
            )
        theta = theta or rope.get("rope_theta")
    require({"rope_theta": theta}, ["rope_theta"])
    base = float(theta or 0)
    if not 0 < base < math.inf:
        raise UsageError(f"config.json field rope_theta: expected a positive number, got {theta!r}")
    return base


def only(fields: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses other values of fields than those of the releases; a field may be absent or null.

    Raises:
        UsageError: naming the field.
    """
    for name, value in expected.items():
        got = fields.get(name)
        if got is not None and got != value:
            raise UsageError(f"config.json field {name}: expected {value!r} (the releases), got {got!r}")


def check_heads(fields: Mapping[str, Any]) -> int:
    """The number of key/value heads, where config.json names sizes as Qwen2's does.

    Raises:
        UsageError: the numbers of heads and the width do not divide each other.
    """
    heads, dim = fields["num_attention_heads"], fields["hidden_size"]
    kv_heads = heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"]
    if heads % kv_heads or (not fields.get("head_dim") and dim % heads):
        raise UsageError(
            "config.json: expected num_attention_heads to divide hidden_size and num_key_value_heads to divide "
            f"num_attention_heads, got hidden_size {dim}, num_attention_heads {heads}, num_key_value_heads {kv_heads}"
        )
    return kv_heads


def block_length(fields: Mapping[str, Any], *, default: int) -> int:
    """How long the blocks of a mask are that is causal by blocks.

    Raises:
        UsageError: something else than a positive number.
    """
    for name in BLOCK_FIELDS:
        if (length := fields.get(name)) is not None:
            if type(length) is not int or length < 1:
                raise UsageError(f"config.json field {name}: expected a positive whole number, got {length!r}")
            return length
    return default


def mask_id(fields: Mapping[str, Any], *, released: Mapping[int, int]) -> int | None:
    """The [MASK] token: what config.json says, or the release's; None: it is not known.

    Args:
        fields: of config.json.
        released: the mask of the releases, whose config.json does not name it, by the size of their vocabulary.
    """
    ids = token_ids(fields, "mask_token_id")
    return ids[0] if ids else released.get(fields["vocab_size"])


def number(fields: Mapping[str, Any], name: str, *, default: float) -> float:
    """The number in a field; `default` only if the field is absent or null."""
    value = fields.get(name)
    return default if value is None else float(value)


def token_ids(fields: Mapping[str, Any], name: str, *, file: str = "config.json") -> tuple[int, ...]:
    """The token ids in a field: a number, a list of them, or nothing (null, [], and -1 as Llama's files write it).

    Args:
        fields: of the file.
        name: the field.
        file: its name, for the error.

    Raises:
        UsageError: something else.
    """
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise UsageError(f"{file} field {name}: expected a token id or a list of them, got {value!r}")
    return tuple(ids)


def first_token_id(fields: Mapping[str, Any], name: str) -> int:
    """The token id in a field of config.json, the first if it is a list.

    Raises:
        UsageError: there is none.
    """
    ids = token_ids(fields, name)
    if not ids:
        raise UsageError(f"config.json field {name}: expected a token id, got {fields.get(name)!r}")
    return ids[0]
