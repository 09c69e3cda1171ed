"""Dream (arXiv 2508.15487): Qwen2 turned into a bidirectional masked diffusion model.

The tensors are Qwen2's. It was trained to predict a masked token where Qwen2 predicts the next one, so position i is
read from the output at i - 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm_jax.models import qwen2
from dllm_jax.models.fields import first_token_id, require
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = qwen2.TENSOR_NAMES
shape_fields = qwen2.shape_fields


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of a Dream config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    require(fields, ["mask_token_id"])
    return dataclasses.replace(
        qwen2.parse_config(fields), causal_block=0, logit_shift=1, mask_id=first_token_id(fields, "mask_token_id")
    )
