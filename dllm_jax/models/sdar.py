"""SDAR (arXiv 2510.06303): Qwen3 turned into a diffusion model that is causal by blocks. The tensors are Qwen3's.

The releases have blocks of 4, unless their name ends in -b8, -b16, -b32 or -b64; their config.json has neither that
nor the mask.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dllm_jax.models import qwen3
from dllm_jax.models.fields import block_length, mask_id
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = qwen3.TENSOR_NAMES
BLOCK = 4
MASKS = {151936: 151669}  # by the size of the vocabulary
END_OF_TURN = {151936: 151645}  # <|im_end|>, with which an answer of the chat models ends; their config.json has EoS
shape_fields = qwen3.shape_fields
_NAMED = re.compile(r"sdar[\w.-]*-b(8|16|32|64)(?=[-/\\]|$)", re.IGNORECASE)


def block_of(name: str) -> int | None:
    """The block length in the name of a release (SDAR-8B-Chat-b32), or of a folder; None if there is none."""
    found = _NAMED.findall(name)
    return int(found[-1]) if found else None


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of an SDAR config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    turn = END_OF_TURN.get(fields.get("vocab_size", 0))
    return dataclasses.replace(
        qwen3.parse_config(fields, in_blocks=True),
        causal_block=block_length(fields, default=BLOCK),
        block_causal=True,
        mask_id=mask_id(fields, released=MASKS),
        other_end_ids=() if turn is None else (turn,),
    )
