"""Qwen2: causal attention with and without a cache, checkpoints both ways, config fields."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax.api import logits
from dllm_jax.checkpoints import files, hf, layout
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import ASSETS, load_model
from dllm_jax.data import text
from dllm_jax.data.prompts import Prompt
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models import qwen2, registry
from dllm_jax.models.cache import LayerCache
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import TokenizerSettings
from tests.checkpoints.folders import same_bits, tensors, with_fields, with_tensors
from tests.traces import GOLDENS

TINY = GOLDENS / "checkpoints" / "qwen2-tiny"
TOKENS = np.random.default_rng(0).integers(0, 290, size=(3, 24))
PAD = np.array([0, 5, 2])  # columns of padding on the left


def test_left_padding_and_later_tokens_change_nothing() -> None:
    model = load_model(TINY)
    whole = logits(model, TOKENS, np.arange(24)[None] >= PAD[:, None])
    assert np.isfinite(whole).all()
    for row, pad in enumerate(PAD):
        alone = logits(model, TOKENS[row : row + 1, pad:])[0]
        np.testing.assert_allclose(whole[row, pad:], alone, rtol=0, atol=1e-4)
        shorter = logits(model, TOKENS[row : row + 1, pad:-6])[0]
        np.testing.assert_allclose(shorter, alone[:-6], rtol=0, atol=1e-4)


def incremental(model: Model, *, prefill: int, widths: list[int], starts_SB: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] of a forward of the first columns and then, per step, of some columns from a start per row."""
    module, config = nnx.merge(model.graphdef, model.params), model.config
    shape = (len(PAD), TOKENS.shape[1], config.num_kv_heads, config.head_dim)
    cache = [LayerCache(k=jnp.full(shape, 7.0), v=jnp.full(shape, 7.0)) for _ in range(config.num_layers)]
    out = np.zeros((*TOKENS.shape, config.vocab_size), np.float32)
    rows = np.arange(len(PAD))[:, None]
    for width, start_B in zip([prefill, *widths], [np.zeros_like(PAD), *starts_SB], strict=True):
        columns_BT = start_B[:, None] + np.arange(width)
        real = jnp.arange(TOKENS.shape[1])[None] >= PAD[:, None]
        hidden, cache = module(
            jnp.asarray(TOKENS[rows, columns_BT]),
            jnp.asarray(columns_BT - PAD[:, None]),
            real_BS=real,
            cache=cache,
            start=jnp.asarray(start_B),
        )
        out[rows, columns_BT] = module.unembed(hidden)
    return out


@pytest.mark.parametrize("path", [TINY, "verifier-tiny"], ids=["qwen2-tiny", "verifier-tiny"])
def test_steps_with_a_cache_equal_the_full_forward(path) -> None:
    model = load_model(path)
    valid = np.arange(24)[None] >= PAD[:, None]
    expected = logits(model, TOKENS, valid)
    # Rows advance by different amounts: some columns run twice, over the stale keys of an earlier attempt.
    starts_SB = np.array([[9, 9, 9], [14, 11, 12], [18, 16, 14], [19, 19, 19]])
    got = incremental(model, prefill=9, widths=[5, 5, 5, 5], starts_SB=starts_SB)
    np.testing.assert_allclose(got[valid], expected[valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_orbax_and_back_bit_for_bit(dtype: str, tmp_path) -> None:
    convert(TINY, tmp_path / "source", to="hf", dtype=dtype, overwrite=False)
    convert(tmp_path / "source", tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(tmp_path / "source"), tensors(tmp_path / "hf"))
    if dtype == "float32":
        assert same_bits(tensors(TINY), tensors(tmp_path / "hf"))
    assert not any(name.startswith("lm_head") for name in tensors(tmp_path / "hf"))


@pytest.mark.parametrize(("fsdp", "tensor", "parts"), [(2, 2, 2), (1, 4, 4), (8, 1, 1)])
def test_on_a_mesh_the_logits_are_the_same(fsdp: int, tensor: int, parts: int) -> None:
    model = load_model(TINY, mesh=make_mesh(fsdp=fsdp, tensor=tensor))
    bias = layout.flatten(model.params)["layers.1.attention.qkv_bias"]
    assert bias.size == parts * bias.addressable_shards[0].data.size  # two KV heads: copied for four devices
    np.testing.assert_allclose(logits(model, TOKENS), logits(load_model(TINY), TOKENS), rtol=0, atol=1e-4)


def test_the_bundled_verifier_knows_the_bundled_tasks() -> None:
    codec = text.load(ASSETS / "verifier-tiny", TokenizerSettings())
    tasks = [json.loads(line) for line in (ASSETS / "tasks.jsonl").read_text().splitlines()[:100:10]]
    prompts = [codec.encode(Prompt(id=0, index=0, line=1, text=task["prompt"])) for task in tasks]
    answers = [codec.tokenizer.encode(task["answer"], add_special_tokens=False) for task in tasks]
    tokens, is_answer = np.zeros((2, len(tasks), 160), int)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        is_answer[row, len(prompt) : len(prompt) + len(answer)] = 1
    told = logits(load_model("verifier-tiny"), tokens)[:, :-1].argmax(-1)
    right = (told == tokens[:, 1:])[is_answer[:, 1:] == 1]
    assert right.mean() > 0.9, right.mean()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen2_0_5b", 494_032_768),
        ("dream_7b", 15_231_233_024 // 2),
        ("llada2_mini", 16_255_643_392),
        ("llada2_flash", 102_889_705_216),
        ("llada_moe_7b", 7_356_880_896),
        ("sdar_8b", 8_190_735_360),
        ("fast_dllm_v2_7b", 7_615_616_512),
    ],
)
def test_presets_have_the_size_of_the_releases(name: str, count: int) -> None:
    params = abstract_model(PRESETS[name], dtype=jnp.dtype(jnp.bfloat16))[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def fields(**changes: object) -> dict[str, object]:
    return json.loads((TINY / "config.json").read_text()) | changes


def test_config_variants_that_mean_the_same() -> None:
    config = registry.parse_config(fields())
    assert (config.causal, config.qkv_bias, config.tied_embeddings, config.logit_shift) == (True, True, True, 0)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    for same in (
        fields(rope_theta=None, rope_parameters=rope),
        fields(rope_scaling={"type": "default"}),
        fields(use_sliding_window=True, sliding_window=None),
        fields(use_sliding_window=True, sliding_window=128, max_window_layers=2),
        fields(head_dim=12),
    ):
        assert registry.parse_config(same) == config
    assert registry.parse_config(fields(head_dim=20)).head_dim == 20
    assert registry.parse_config(fields(num_key_value_heads=None)).num_kv_heads == 4
    assert registry.parse_config(fields(rms_norm_eps=0)).norm_eps == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "use_sliding_window: expected false",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: expected none"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters: expected none"),
        ({"use_mrope": True}, "use_mrope: expected false, got True"),
        ({"rope_theta": None}, "rope_theta, got none"),
        ({"hidden_size": None, "eos_token_id": None}, "field(s) hidden_size, eos_token_id, got none"),
        ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads, got"),
        ({"hidden_size": 50}, "num_attention_heads to divide hidden_size"),
    ],
)
def test_other_variants_are_refused_by_name(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError) as failure:
        registry.parse_config(fields(**changes))
    assert told in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_broken_folder_is_one_line(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"config\.json field rope_scaling: expected none .*, got 'yarn'"):
        load_model(with_fields(TINY, tmp_path / "rope", rope_scaling="yarn"))
    bias = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(UsageError, match=f"1 missing: {bias}"):
        load_model(with_tensors(TINY, tmp_path / "bias", lambda edited: edited.pop(bias)))
    with pytest.raises(UsageError, match=r"1 missing: lm_head\.weight"):
        load_model(with_fields(TINY, tmp_path / "untied", tie_word_embeddings=False))


def test_a_head_wider_than_its_share_round_trips(tmp_path) -> None:
    def widen(edited: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(1)
        for name in list(edited):
            if "_proj" in name and "self_attn" in name:
                rows, *columns = edited[name].shape
                heads = {48: 4, 24: 2}
                shape = (48, 80) if "o_proj" in name else (heads[rows] * 20, *columns)
                edited[name] = rng.normal(0, 0.05, shape).astype(np.float32)

    source = with_tensors(with_fields(TINY, tmp_path / "a", head_dim=20), tmp_path / "b", widen)
    model = load_model(source)
    assert np.isfinite(logits(model, TOKENS)).all()
    hf.export_hf(model, tmp_path / "c")
    assert same_bits(tensors(source), tensors(tmp_path / "c"))


def test_config_json_of_an_own_model_is_read_back(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["qwen2_0_5b"], other_end_ids=(7, 9))
    (tmp_path / "config.json").write_text(json.dumps(qwen2.config_fields(config)))
    assert files.read_config(tmp_path) == config
