"""LLaDA-MoE (arXiv 2509.24389): LLaDA's bidirectional diffusion model with experts. Its fields and tensor names.

Its model_type is llada, as LLaDA's; the field num_experts tells them apart.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models import qwen3
from dllm_jax.models.experts import ExpertSettings
from dllm_jax.models.fields import (
    check_heads,
    first_token_id,
    mask_id,
    number,
    only,
    refuse_variants,
    require,
    rope_theta,
)
from dllm_jax.models.transformer import TransformerConfig

TENSOR_NAMES = (
    qwen3.TENSOR_NAMES
    | qwen3.EXPERT_NAMES
    | {
        "layers.{i}.experts.router_bias": ("model.layers.{i}.mlp.expert_bias",),
        "layers.{i}.experts.shared.gate_up": (
            "model.layers.{i}.shared_expert.gate_proj.weight",
            "model.layers.{i}.shared_expert.up_proj.weight",
        ),
        "layers.{i}.experts.shared.down": ("model.layers.{i}.shared_expert.down_proj.weight",),
    }
)
MASKS = {157184: 156895}  # by the size of the vocabulary

_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "expert_intermediate_size",
    "num_experts_per_tok",
    "eos_token_id",
)

# Variants that the release does not use and that would change the arithmetic.
_ONLY = {"hidden_act": "silu", "attention_bias": False, "clip_qkv": None, "partial_rotary_factor": 1}


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of a LLaDA-MoE config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    refuse_variants(fields)
    require(fields, _NEEDED)
    only(fields, _ONLY)
    dim, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = check_heads(fields)
    experts = _experts(fields)
    return TransformerConfig(
        family="llada_moe",
        num_layers=fields["num_hidden_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.get("head_dim") or dim // heads,
        mlp_dim=fields.get("dense_intermediate_size") or experts.hidden_dim,
        vocab_size=fields["vocab_size"],
        rope_theta=rope_theta(fields),
        norm_eps=number(fields, "rms_norm_eps", default=1e-5),
        max_length=fields["max_position_embeddings"],
        qk_norm=fields.get("qk_layernorm") is not False,
        tied_embeddings=bool(fields.get("tie_word_embeddings")),
        experts=experts,
        mask_id=mask_id(fields, released=MASKS),
        eos_id=first_token_id(fields, "eos_token_id"),
    )


def _experts(fields: Mapping[str, Any]) -> ExpertSettings:
    """The mixture; the release's code does not heed norm_topk_prob, the score function, groups and scale."""
    layers = fields["num_hidden_layers"]
    frequency = fields.get("moe_layer_freq")
    frequency = [1] * layers if frequency is None else frequency
    if not isinstance(frequency, list) or len(frequency) != layers:
        raise UsageError(f"config.json field moe_layer_freq: expected a list of {layers} numbers, got {frequency!r}")
    return ExpertSettings(
        count=fields["num_experts"],
        per_token=fields["num_experts_per_tok"],
        hidden_dim=fields["expert_intermediate_size"],
        dense_layers=tuple(layer for layer, each in enumerate(frequency) if not each),
        shared_dim=fields.get("shared_expert_intermediate_size") or 0,
        biased=bool(fields.get("moe_router_enable_expert_bias")),
        bias_counts=True,
    )
