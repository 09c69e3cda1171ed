"""Qwen3 (arXiv 2505.09388): a causal language model. Qwen2's fields and tensors, with normalised queries and keys.

SDAR shares its layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models import qwen2
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = qwen2.TENSOR_NAMES | {
    "layers.{i}.attention.q_norm.scale": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.attention.k_norm.scale": ("model.layers.{i}.self_attn.k_norm.weight",),
}
EXPERT_NAMES = {  # of layers with experts, by the names of Qwen3-MoE; {e} is the expert
    "layers.{i}.experts.router": ("model.layers.{i}.mlp.gate.weight",),
    "layers.{i}.experts.expert_gate": ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight",),
    "layers.{i}.experts.expert_up": ("model.layers.{i}.mlp.experts.{e}.up_proj.weight",),
    "layers.{i}.experts.expert_down": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
}
HEAD_DIM = 128  # where config.json does not say
shape_fields = qwen2.shape_fields


def parse_config(fields: Mapping[str, Any], *, in_blocks: bool = False) -> TransformerConfig:
    """Reads the fields of a Qwen3 config.json.

    Args:
        fields: of config.json.
        in_blocks: for a family of these layers whose mask is causal by blocks.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    if fields.get("attention_bias"):
        got = fields["attention_bias"]
        raise UsageError(f"config.json field attention_bias: expected false (the releases), got {got!r}")
    given = {"head_dim": HEAD_DIM} | {name: value for name, value in fields.items() if value is not None}
    config = qwen2.parse_config(given, in_blocks=in_blocks)
    return dataclasses.replace(config, qkv_bias=False, qk_norm=True)
