"""Which family a checkpoint belongs to, its tensor names, and shapes known by name."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models import dream, llada, qwen2
from dllm_jax.models.transformer import TransformerConfig

_FAMILIES = {"llada": llada, "Dream": dream, "qwen2": qwen2}  # by model_type

# Shapes of public models for benchmarks with random weights (`model.preset`).
PRESETS = {
    "llada_8b": TransformerConfig(
        family="llada", num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=12288,
        vocab_size=126464, rope_theta=5e5, norm_eps=1e-5, max_length=4096, mask_id=126336, eos_id=126081,
        other_end_ids=(126348,),
    ),
    "llada_tiny": TransformerConfig(
        family="llada", num_layers=8, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384,
        vocab_size=512, rope_theta=1e4, norm_eps=1e-5, max_length=4096, mask_id=2, eos_id=0, other_end_ids=(5,),
    ),
    "dream_7b": TransformerConfig(
        family="Dream", num_layers=28, embed_dim=3584, num_heads=28, num_kv_heads=4, head_dim=128, mlp_dim=18944,
        vocab_size=152064, rope_theta=1e6, norm_eps=1e-6, max_length=131072, qkv_bias=True, logit_shift=1,
        mask_id=151666, eos_id=151643,
    ),
    "qwen2_0_5b": TransformerConfig(
        family="qwen2", num_layers=24, embed_dim=896, num_heads=14, num_kv_heads=2, head_dim=64, mlp_dim=4864,
        vocab_size=151936, rope_theta=1e6, norm_eps=1e-6, max_length=32768, qkv_bias=True, tied_embeddings=True,
        causal=True, eos_id=151643,
    ),
}  # fmt: skip


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """The model a config.json describes; decided by its fields, since LLaDA-MoE also says "llada".

    Raises:
        UsageError: an unknown or unsupported model, or a missing field.
    """
    model_type = fields.get("model_type")
    if model_type == "llada2_moe" or "num_experts" in fields:
        raise UsageError(f"config.json: mixture-of-experts models (model_type {model_type!r}) are not supported yet")
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UsageError(f"config.json field model_type: expected one of {known}, got {model_type!r}")
    return _FAMILIES[model_type].parse_config(fields)


def tensor_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter path ("layers.0.attention.qkv") -> names of the Hugging Face tensors it is made of, in order."""
    names = {}
    for path, tensors in _FAMILIES[config.family].TENSOR_NAMES.items():
        if path == "head" and config.tied_embeddings:
            continue
        for i in range(config.num_layers) if "{i}" in path else [0]:
            names[path.format(i=i)] = tuple(name.format(i=i) for name in tensors)
    return names
