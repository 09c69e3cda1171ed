"""Which family a checkpoint belongs to, its tensor names, and shapes known by name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.models import dream, fast_dllm, llada, llada2, llada_moe, qwen2, qwen3, sdar
from dllm_jax.models.experts import ExpertSettings
from dllm_jax.models.transformer import TransformerConfig

FAMILIES: dict[str, Any] = {  # by model_type
    "llada": llada,
    "illada": llada,
    "llada_moe": llada_moe,
    "llada2_moe": llada2,
    llada2.STACKED: llada2,
    "Dream": dream,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "sdar": sdar,
    sdar.MIXTURE: sdar,
    "Fast_dLLM_Qwen": fast_dllm,
}

# Families whose architecture says more than their model_type, by a part of it in small letters and digits.
_ARCHITECTURES = {
    "llada2moe": ("llada2_moe", llada2.STACKED),
    "lladamoe": ("llada", "llada_moe"),
    "sdarmoe": ("sdar_moe",),
    "sdarfor": ("sdar",),
    "fastdllm": ("Fast_dLLM_Qwen",),
    "qwen3for": ("qwen3",),
}

# Families that are not supported, by a part of their model_type or architecture in small letters and digits.
_OTHERS = {
    "lladav": "LLaDA-V",
    "mmada": "MMaDA",
    "a2d": "a2d",
    "qwen3moe": "Qwen3-MoE",
    "qwen3vl": "Qwen3-VL",
    "qwen3next": "Qwen3-Next",
    "qwen3omni": "Qwen3-Omni",
    "qwen2moe": "Qwen2-MoE",
    "qwen2vl": "Qwen2-VL",
    "qwen25vl": "Qwen2.5-VL",
}
_MIXTURES = ("llada", "llada_moe", "llada2_moe", llada2.STACKED, sdar.MIXTURE)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


def parse_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """The model a config.json describes; decided by its fields, since LLaDA-MoE also says "llada".

    Raises:
        UsageError: an unknown or unsupported model, or a missing field.
    """
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or []
    known = ", ".join(sorted(FAMILIES))
    names = [str(name) for name in (model_type, *(architectures if isinstance(architectures, list) else []))]
    words = [re.sub("[^a-z0-9]", "", name.lower()) for name in names]
    others = [family for part, family in _OTHERS.items() if any(part in word for word in words)]
    if not others and model_type not in _MIXTURES and any(fields.get(name) for name in _EXPERTS):
        others = ["mixture of experts"]
    if others:
        told = ", ".join(dict.fromkeys(names))
        raise UsageError(
            f"config.json: expected a model_type among {known}, got {others[0]}, which is not supported yet ({told})"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(f"config.json field model_type: expected one of {known}, got {model_type!r}")
    meant = [families for part, families in _ARCHITECTURES.items() if any(part in word for word in words[1:])]
    if meant and model_type not in meant[0]:
        raise UsageError(f"config.json field model_type: expected {meant[0][0]} for {names[1]}, got {model_type!r}")
    family = FAMILIES[model_type]
    if family is llada and fields.get("num_experts"):
        family = llada_moe
    if family is llada and "d_model" not in fields and "hidden_size" in fields:
        raise UsageError("config.json: expected the fields of LLaDA (d_model, ...), got hidden_size: another family")
    config = family.parse_config(fields)
    if config.experts:
        _check_experts(config.experts, layers=config.num_layers)
    return config


def _check_experts(experts: ExpertSettings, *, layers: int) -> None:
    """Refuses a mixture that does not work out.

    Raises:
        UsageError: naming what does not.
    """
    count, groups, best = experts.count, experts.groups, experts.groups_per_token
    if count % groups or not 1 <= best <= groups:
        raise UsageError(
            f"config.json: expected num_experts {count} to be a multiple of the groups {groups}, of which a token has "
            f"some, got {best} of them"
        )
    most, told = count // groups * best, f", those of {best} groups" if groups > 1 else ""
    if not 1 <= experts.per_token <= most:
        raise UsageError(f"config.json: expected 1 to {most} experts per token{told}, got {experts.per_token}")
    if len(experts.dense_layers) >= layers:
        raise UsageError(f"config.json: expected experts in some of the {layers} layers, got none")


def shape_fields(config: TransformerConfig) -> dict[str, Any]:
    """The fields of config.json that a training may change: sizes, and the longest text."""
    return FAMILIES[config.family].shape_fields(config)


def tensor_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter path ("layers.0.attention.qkv") -> names of the Hugging Face tensors it is made of, in order."""
    names = {}
    for path, tensors in FAMILIES[config.family].TENSOR_NAMES.items():
        for i in range(config.num_layers) if "{i}" in path else [0]:
            if _has(config, path, layer=i):
                names[path.format(i=i)] = tuple(name for each in tensors for name in _expanded(each, i, config))
    return names


def _has(config: TransformerConfig, path: str, *, layer: int) -> bool:
    """Whether a model has a parameter that its family may have."""
    experts, kind = config.experts, path.rpartition(".")[2]
    if ".mlp." in path:
        return config.is_dense(layer)
    if ".experts." in path:
        in_layer = experts is not None and not config.is_dense(layer)
        wanted = {"router_bias": experts and experts.biased, "down": experts and experts.shared_dim}
        return in_layer and bool(wanted.get("down" if ".shared." in path else kind, True))
    if "_norm" in path and ".attention." in path:
        return config.qk_norm
    return {"head": not config.tied_embeddings, "qkv_bias": config.qkv_bias}.get(kind, True)


def _expanded(name: str, layer: int, config: TransformerConfig) -> list[str]:
    """The names that a pattern stands for in a layer: one, or one for every expert; stacked ones have the same."""
    if "{e}" not in name or config.experts is None:
        return [name.format(i=layer)]
    if config.experts.stacked_files:
        name = name.replace(".{e}", "").removesuffix(".weight")
    return [name.format(i=layer, e=expert) for expert in range(config.experts.count)]


def embedding_and_head(config: TransformerConfig) -> tuple[str, str]:
    """The names of the two tensors that are one in a tied model."""
    names = FAMILIES[config.family].TENSOR_NAMES
    return names["embedding"][0], names["head"][0]


def count_layers(config: TransformerConfig, names: Iterable[str]) -> int:
    """How many layers a checkpoint has, by the names of its tensors."""
    start = next(path for path in FAMILIES[config.family].TENSOR_NAMES if "{i}" in path)
    prefix = FAMILIES[config.family].TENSOR_NAMES[start][0].partition("{i}")[0]
    indices = (name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix))
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)
