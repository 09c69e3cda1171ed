"""Qwen2 (arXiv 2407.10671): a causal language model. Its config.json fields and tensor names, which Dream shares."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models.fields import check_heads, first_token_id, number, refuse_variants, require, rope_theta
from dllm_jax.models.transformer import TransformerConfig

# Our parameter -> the tensors it is made of, in order; {i} is the layer.
TENSOR_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "layers.{i}.attention_norm.scale": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.attention.qkv_bias": (
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
    ),
    "layers.{i}.attention.out": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.mlp_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.mlp.gate_up": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj.weight",),
    "final_norm.scale": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}

_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "eos_token_id",
)


def parse_config(fields: Mapping[str, Any], *, in_blocks: bool = False) -> TransformerConfig:
    """Reads the fields of a Qwen2 config.json.

    Args:
        fields: of config.json.
        in_blocks: for a family of these layers whose mask is causal by blocks.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    refuse_variants(fields, in_blocks=in_blocks)
    require(fields, _NEEDED)
    _refuse_qwen_variants(fields)
    heads, dim = fields["num_attention_heads"], fields["hidden_size"]
    kv_heads, head_dim = check_heads(fields), fields.get("head_dim")
    return TransformerConfig(
        family=fields["model_type"],
        num_layers=fields["num_hidden_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or dim // heads,
        mlp_dim=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        rope_theta=rope_theta(fields),
        norm_eps=number(fields, "rms_norm_eps", default=1e-6),
        max_length=fields["max_position_embeddings"],
        qkv_bias=fields.get("attention_bias") is not False,
        tied_embeddings=fields.get("tie_word_embeddings"),
        causal_block=1,
        eos_id=first_token_id(fields, "eos_token_id"),
    )


def shape_fields(config: TransformerConfig) -> dict[str, Any]:
    """The sizes of a model as config.json names them."""
    return {
        "hidden_size": config.embed_dim,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
    }


def config_fields(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a Qwen2 model: what `parse_config` reads back, and what transformers wants to know."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **shape_fields(config),
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
        "use_sliding_window": False,
        "eos_token_id": list(config.end_ids) if config.end_ids[1:] else config.eos_id,
        "pad_token_id": config.eos_id,
        "bos_token_id": None,
    }


def _refuse_qwen_variants(fields: Mapping[str, Any]) -> None:
    """Refuses what the releases do not use and what would change the arithmetic."""
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise UsageError(f"config.json field hidden_act: expected 'silu', got {activation!r}")
    if fields.get("use_mrope"):
        raise UsageError(f"config.json field use_mrope: expected false, got {fields['use_mrope']!r}")
    window, first = fields.get("sliding_window"), fields.get("max_window_layers", 0)  # layers behind `first` slide
    if fields.get("use_sliding_window") and window is not None and first < fields["num_hidden_layers"]:
        raise UsageError(f"config.json field use_sliding_window: expected false (full attention), got {window} tokens")
