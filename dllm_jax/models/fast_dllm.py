"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2 turned into a diffusion model that is causal by blocks.

The tensors are Qwen2's. As in Dream a position is read from the output at its left, here inside its own block: the
first token of a block comes from the last position of the block before.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm_jax.models import qwen2
from dllm_jax.models.fields import block_length, mask_id
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = qwen2.TENSOR_NAMES
BLOCK = 32
MASKS = {152064: 151665, 151936: 151665}  # by the size of the vocabulary: 7B, 1.5B
shape_fields = qwen2.shape_fields


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of a Fast-dLLM v2 config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    return dataclasses.replace(
        qwen2.parse_config(fields, in_blocks=True),
        causal_block=block_length(fields, default=BLOCK),
        block_causal=True,
        logit_shift=1,
        mask_id=mask_id(fields, released=MASKS),
    )
