"""LLaDA (arXiv 2502.09992): a bidirectional masked diffusion model. Its config.json fields and tensor names."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models.fields import first_token_id, number, only, refuse_variants, require, rope_theta
from dllm_jax.models.transformer import TransformerConfig

# Our parameter -> the tensors it is made of, in order; {i} is the layer.
TENSOR_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.transformer.wte.weight",),
    "layers.{i}.attention_norm.scale": ("model.transformer.blocks.{i}.attn_norm.weight",),
    "layers.{i}.attention.qkv": (
        "model.transformer.blocks.{i}.q_proj.weight",
        "model.transformer.blocks.{i}.k_proj.weight",
        "model.transformer.blocks.{i}.v_proj.weight",
    ),
    "layers.{i}.attention.out": ("model.transformer.blocks.{i}.attn_out.weight",),
    "layers.{i}.mlp_norm.scale": ("model.transformer.blocks.{i}.ff_norm.weight",),
    "layers.{i}.mlp.gate_up": (
        "model.transformer.blocks.{i}.ff_proj.weight",
        "model.transformer.blocks.{i}.up_proj.weight",
    ),
    "layers.{i}.mlp.down": ("model.transformer.blocks.{i}.ff_out.weight",),
    "final_norm.scale": ("model.transformer.ln_f.weight",),
    "head": ("model.transformer.ff_out.weight",),
}

_NEEDED = (
    "d_model",
    "n_heads",
    "n_layers",
    "mlp_hidden_size",
    "vocab_size",
    "max_sequence_length",
    "mask_token_id",
    "eos_token_id",
)

# Variants of the architecture that the releases do not use and that would change the arithmetic.
_ONLY = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "use_sliding_window": False,
    "sliding_window": None,
}


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of a LLaDA config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    refuse_variants(fields)
    require(fields, _NEEDED)
    only(fields, _ONLY)
    tokens = fields["vocab_size"]
    rows = fields.get("embedding_size") or tokens
    if not 0 < tokens <= rows:
        raise UsageError(f"config.json field vocab_size: expected 1 to embedding_size ({rows}), got {tokens!r}")
    heads = fields["n_heads"]
    kv_heads = heads if fields.get("n_kv_heads") is None else fields["n_kv_heads"]
    if fields["d_model"] % heads or heads % kv_heads:
        raise UsageError(
            "config.json: expected n_heads to divide d_model and n_kv_heads to divide n_heads, "
            f"got d_model {fields['d_model']}, n_heads {heads}, n_kv_heads {kv_heads}"
        )
    return TransformerConfig(
        family="llada",
        num_layers=fields["n_layers"],
        embed_dim=fields["d_model"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields["d_model"] // heads,
        mlp_dim=fields["mlp_hidden_size"],
        vocab_size=rows,
        rope_theta=rope_theta(fields),
        norm_eps=number(fields, "rms_norm_eps", default=1e-5),
        max_length=fields["max_sequence_length"],
        tied_embeddings=fields.get("weight_tying"),
        mask_id=first_token_id(fields, "mask_token_id"),
        eos_id=first_token_id(fields, "eos_token_id"),
    )


def shape_fields(config: TransformerConfig) -> dict[str, Any]:
    """The sizes of a model as config.json names them."""
    return {
        "d_model": config.embed_dim,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "mlp_hidden_size": config.mlp_dim,
        "max_sequence_length": config.max_length,
    }
