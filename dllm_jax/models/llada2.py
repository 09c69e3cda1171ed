"""LLaDA2.0 and 2.1 (arXiv 2512.15745): mixtures of experts, causal by blocks. Their config.json and tensor names.

Both have model_type llada2_moe, and nothing in config.json tells one from the other: only their loops differ. Folders
that dFactory has merged (llada2_moe_veomni) hold all experts of a layer in one tensor.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models.experts import ExpertSettings
from dllm_jax.models.fields import (
    block_length,
    check_heads,
    mask_id,
    number,
    only,
    refuse_variants,
    require,
    rope_theta,
    token_ids,
)
from dllm_jax.models.transformer import TransformerConfig

# Our parameter -> the tensors it is made of, in order; {i} is the layer, {e} the expert. One that is there several
# times holds its parts behind each other.
TENSOR_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.word_embeddings.weight",),
    "layers.{i}.attention_norm.scale": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.attention.qkv": ("model.layers.{i}.attention.query_key_value.weight",) * 3,
    "layers.{i}.attention.q_norm.scale": ("model.layers.{i}.attention.query_layernorm.weight",),
    "layers.{i}.attention.k_norm.scale": ("model.layers.{i}.attention.key_layernorm.weight",),
    "layers.{i}.attention.out": ("model.layers.{i}.attention.dense.weight",),
    "layers.{i}.mlp_norm.scale": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.mlp.gate_up": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    "layers.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.experts.router": ("model.layers.{i}.mlp.gate.weight",),
    "layers.{i}.experts.router_bias": ("model.layers.{i}.mlp.gate.expert_bias",),
    "layers.{i}.experts.expert_gate": ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight",),
    "layers.{i}.experts.expert_up": ("model.layers.{i}.mlp.experts.{e}.up_proj.weight",),
    "layers.{i}.experts.expert_down": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
    "layers.{i}.experts.shared.gate_up": (
        "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
        "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    ),
    "layers.{i}.experts.shared.down": ("model.layers.{i}.mlp.shared_experts.down_proj.weight",),
    "final_norm.scale": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
BLOCK = 32
MASKS, EOS = {157184: 156895}, {157184: 156892}  # by the size of the vocabulary
STACKED = "llada2_moe_veomni"

_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)

# Variants that the releases do not use and that would change the arithmetic.
_ONLY = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Reads the fields of a LLaDA2 config.json.

    Raises:
        UsageError: a field is missing, or asks for a variant that is not built.
    """
    if "image_token_offset" in fields:
        raise UsageError(
            "config.json field image_token_offset: expected none, got one of LLaDA2.0-Uni (images are not supported)"
        )
    refuse_variants(fields, in_blocks=True)
    require(fields, _NEEDED)
    only(fields, _ONLY)
    dim, heads, tokens = fields["hidden_size"], fields["num_attention_heads"], fields["vocab_size"]
    kv_heads = check_heads(fields)
    head_dim = fields.get("head_dim") or dim // heads
    ends = token_ids(fields, "eos_token_id") or token_ids(fields, "pad_token_id") or (EOS.get(tokens),)
    if ends[0] is None:
        raise UsageError("config.json: expected the field eos_token_id or pad_token_id, got none")
    return TransformerConfig(
        family=fields["model_type"],
        num_layers=fields["num_hidden_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=fields["intermediate_size"],
        vocab_size=tokens,
        rope_theta=rope_theta({"rope_theta": 1e4} | dict(fields)),
        norm_eps=number(fields, "rms_norm_eps", default=1e-5),
        max_length=fields["max_position_embeddings"],
        qk_norm=fields.get("use_qk_norm") is not False,
        rotary_dim=int(head_dim * number(fields, "partial_rotary_factor", default=1.0)),
        tied_embeddings=bool(fields.get("tie_word_embeddings")),
        causal_block=block_length(fields, default=BLOCK),
        block_causal=True,
        experts=_experts(fields),
        mask_id=mask_id(fields, released=MASKS),
        eos_id=ends[0],
    )


def _experts(fields: Mapping[str, Any]) -> ExpertSettings:
    """The mixture; norm_topk_prob, score_function and router_dtype say what is always so."""
    hidden = fields["moe_intermediate_size"]
    return ExpertSettings(
        count=fields["num_experts"],
        per_token=fields["num_experts_per_tok"],
        hidden_dim=hidden,
        dense_layers=tuple(range(fields.get("first_k_dense_replace") or 0)),
        shared_dim=hidden * (fields.get("num_shared_experts") or 0),
        sigmoid=True,
        wide_gate=True,
        biased=fields.get("moe_router_enable_expert_bias") is not False,
        groups=fields["n_group"],
        groups_per_token=fields["topk_group"],
        normalized=True,
        scale=number(fields, "routed_scaling_factor", default=1.0),
        stacked_files=fields["model_type"] == STACKED,
    )
