"""SDAR (arXiv 2510.06303): Qwen3 turned into a diffusion model that is causal by blocks.

The tensors are Qwen3's, those of SDAR-MoE (sdar_moe) Qwen3-MoE's. The releases have blocks of 4, unless their name ends
in -b8, -b16, -b32 or -b64; their config.json has neither that nor the mask.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dllm_jax.models import qwen3
from dllm_jax.models.experts import ExpertSettings
from dllm_jax.models.fields import block_length, mask_id, require
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = qwen3.TENSOR_NAMES | qwen3.EXPERT_NAMES
BLOCK = 4
MASKS = {151936: 151669}  # by the size of the vocabulary
END_OF_TURN = {151936: 151645}  # <|im_end|>, with which an answer of the chat models ends; their config.json has EoS
MIXTURE = "sdar_moe"
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
    experts = _experts(fields) if fields["model_type"] == MIXTURE else None
    return dataclasses.replace(
        qwen3.parse_config(fields, in_blocks=True),
        causal_block=block_length(fields, default=BLOCK),
        block_causal=True,
        experts=experts,
        mask_id=mask_id(fields, released=MASKS),
        other_end_ids=() if turn is None else (turn,),
    )


def _experts(fields: Mapping[str, Any]) -> ExpertSettings:
    """The mixture of a layer, of which there is one in every decoder_sparse_step layers."""
    require(fields, ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_hidden_layers"])
    every, plain = fields.get("decoder_sparse_step") or 1, fields.get("mlp_only_layers") or []
    layers = range(fields["num_hidden_layers"])
    return ExpertSettings(
        count=fields["num_experts"],
        per_token=fields["num_experts_per_tok"],
        hidden_dim=fields["moe_intermediate_size"],
        dense_layers=tuple(layer for layer in layers if layer in plain or (layer + 1) % every),
        normalized=bool(fields.get("norm_topk_prob")),
    )
