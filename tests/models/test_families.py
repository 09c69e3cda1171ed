"""The newer families: logits as the references compute them, masks by blocks, what config.json and tokenizers say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.api import logits
from dllm_jax.checkpoints import files, hf
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models import registry, sdar
from dllm_jax.models.layers import rotate
from dllm_jax.models.model import with_causal_block
from tests.checkpoints.folders import copied, same_bits, tensors, with_fields
from tests.traces import GOLDENS, Case, cases

CHECKPOINTS = GOLDENS / "checkpoints"
DENSE = ("fdv2-tiny", "fdv2-tiny-tied", "illada-tiny", "qwen3-tiny", "sdar-tiny", "sdar-tiny-b")
EXPERTS = ("llada2-tiny", "llada2-tiny-b", "lladamoe-tiny", "lladamoe-tiny-b", "sdarmoe-tiny")
CASES = {case.meta["checkpoint"]: case for case in cases("M_models") if "_logits_" in case.name}
TOLERANCE = 2e-4  # the references differ from float64 by up to 5e-5
TOKENS = np.random.default_rng(3).integers(0, 290, size=(2, 24))


def variants(case: Case) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """The arrays of logits in a case: the name, what to ask for, and the tokens."""
    tokens = case.arrays["input_ids"]
    for name, array in case.arrays.items():
        if array.shape[-1:] != (320,):
            continue
        if name == "padded_logits":
            padded = case.arrays.get("padded_input_ids", tokens)
            yield name, {"valid_BL": case.arrays["padded_attention_mask"]}, padded
        else:
            kind = name.removeprefix("logits").removeprefix("_")
            length = {"": None, "full": 0, "block": case.meta.get("block_length")}
            yield name, {"block_length": length[kind] if kind in length else int(kind[5:])}, tokens


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_logits_equal_the_reference(name: str, golden) -> None:
    case, model = CASES[name], load_model(CHECKPOINTS / name)
    for array, asked, tokens in variants(case):
        got, want = logits(model, tokens, **asked), case.arrays[array]
        real = np.asarray(asked.get("valid_BL", np.ones(tokens.shape)), bool)
        np.testing.assert_allclose(got[real], want[real], rtol=0, atol=TOLERANCE, err_msg=array)
    golden(case)


def test_greedy_tokens_of_qwen3() -> None:
    case, model = CASES["qwen3-tiny"], load_model(CHECKPOINTS / "qwen3-tiny")
    tokens = case.arrays["greedy_prompt"]
    while tokens.shape[1] < case.arrays["greedy"].shape[1]:
        padded = np.pad(tokens, ((0, 0), (0, 32 - tokens.shape[1])))
        last = logits(model, padded)[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, last.argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(tokens, case.arrays["greedy"])


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_to_orbax_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    convert(source, tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(source), tensors(tmp_path / "hf"))
    assert load_model(tmp_path / "hf").config == load_model(source).config
    hf.export_hf(load_model(source), tmp_path / "export")
    assert same_bits(tensors(source), tensors(tmp_path / "export"))


@pytest.mark.parametrize("name", ["sdar-tiny", "fdv2-tiny", "qwen3-tiny"])
def test_on_a_mesh_the_logits_are_the_same(name: str) -> None:
    model = load_model(CHECKPOINTS / name, mesh=make_mesh(fsdp=2, tensor=4))
    alone = load_model(CHECKPOINTS / name)
    np.testing.assert_allclose(logits(model, TOKENS), logits(alone, TOKENS), rtol=0, atol=1e-4)


def test_blocks_are_counted_from_the_first_token_of_a_row() -> None:
    model = load_model(CHECKPOINTS / "sdar-tiny")
    pad = np.array([[3], [5]])
    valid = np.arange(24)[None] >= pad
    whole = logits(model, TOKENS, valid, block_length=8)
    for row, start in enumerate(pad[:, 0]):
        alone = logits(model, TOKENS[row : row + 1, start:], block_length=8)[0]
        np.testing.assert_allclose(whole[row, start:], alone, rtol=0, atol=1e-4)


def test_another_mask_has_the_same_weights() -> None:
    model = load_model(CHECKPOINTS / "sdar-tiny")
    assert (model.config.causal_block, model.config.block_causal) == (4, True)
    changed = TOKENS.copy()
    changed[:, 11] = (changed[:, 11] + 1) % 290
    for block, first in ((1, 11), (4, 8), (8, 8), (12, 0), (0, 0)):
        other = with_causal_block(model, block)
        assert other.params is model.params
        assert other.config.causal_block == block
        differs = np.abs(logits(other, TOKENS) - logits(other, changed)).max(axis=(0, 2)) > 1e-6
        assert differs.argmax() == first
        assert differs[first:12].all()
    assert with_causal_block(model, 4) is model


def test_lengths_of_blocks_that_a_model_does_not_take() -> None:
    causal, bidirectional, blocks = (load_model(CHECKPOINTS / name) for name in ("qwen3-tiny", "illada-tiny", DENSE[0]))
    np.testing.assert_array_equal(logits(causal, TOKENS), logits(causal, TOKENS, block_length=1))
    np.testing.assert_array_equal(logits(bidirectional, TOKENS), logits(bidirectional, TOKENS, block_length=0))
    with pytest.raises(UsageError, match=r"block_length: expected none or 1 \(the qwen3 model is causal\), got 0"):
        logits(causal, TOKENS, block_length=0)
    with pytest.raises(UsageError, match=r"block_length: expected none or 0 \(the llada model is bidirect.*, got 8"):
        logits(bidirectional, TOKENS, block_length=8)
    for wrong in (-1, 4.0, True):
        with pytest.raises(UsageError, match="block_length: expected a number of at least 0, got"):
            logits(blocks, TOKENS, block_length=wrong)  # type: ignore[arg-type]


def test_part_of_a_head_is_rotated() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.float32)
    positions = jnp.arange(5)[None]
    part = rotate(x, positions, theta=1e4, rotary_dim=6)
    np.testing.assert_array_equal(part[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(part[..., :6], rotate(x[..., :6], positions, theta=1e4))
    np.testing.assert_array_equal(rotate(x, positions, theta=1e4, rotary_dim=16), rotate(x, positions, theta=1e4))


def fields(name: str, **changes: object) -> dict[str, object]:
    return json.loads((CHECKPOINTS / name / "config.json").read_text()) | changes


def test_what_the_fields_of_the_releases_mean() -> None:
    sdar_8b = registry.parse_config(fields("sdar-tiny", vocab_size=151936, eos_token_id=151643, pad_token_id=151643))
    assert (sdar_8b.mask_id, sdar_8b.end_ids, sdar_8b.causal_block) == (151669, (151643, 151645), 4)
    assert (sdar_8b.qk_norm, sdar_8b.qkv_bias, sdar_8b.logit_shift) == (True, False, 0)
    fast = registry.parse_config(fields("fdv2-tiny", vocab_size=152064, eos_token_id=151645))
    assert (fast.mask_id, fast.causal_block, fast.logit_shift, fast.qkv_bias) == (151665, 32, 1, True)
    assert registry.parse_config(fields("fdv2-tiny", bd_size=16)).causal_block == 16
    assert registry.parse_config(fields("fdv2-tiny", bd_size=None)).causal_block == 32
    tiny = registry.parse_config(fields("sdar-tiny-b", block_size=1))
    assert (tiny.mask_id, tiny.causal_block, tiny.block_causal, tiny.causal) == (310, 1, True, True)
    assert registry.parse_config(fields("sdar-tiny")).mask_id is None
    qwen3 = registry.parse_config(fields("qwen3-tiny", head_dim=None))
    assert (qwen3.causal_block, qwen3.block_causal, qwen3.head_dim, qwen3.mask_id) == (1, False, 128, None)


def test_the_block_length_in_the_name_of_a_release(tmp_path: Path) -> None:
    assert sdar.block_of("models/SDAR-8B-Chat-b32") == 32
    assert sdar.block_of("cache/models--JetLM--SDAR-1.7B-Chat-b8/snapshots/0123") == 8
    assert sdar.block_of("SDAR-8B-Chat") is None
    folder = copied(CHECKPOINTS / "sdar-tiny", tmp_path / "SDAR-8B-Chat-b16")
    assert files.read_config(folder).causal_block == 16
    convert(folder, tmp_path / "mine", to="orbax", dtype="keep", overwrite=False)
    assert load_model(tmp_path / "mine").config.causal_block == 16
    named = copied(CHECKPOINTS / "sdar-tiny-b", tmp_path / "sdar-b64")
    assert files.read_config(named).causal_block == 4  # config.json says more than a name


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<MASK>": 305, "<|im_end|>": 301}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"305": {"content": "|<MASK>|", "special": True}}}),
    ],
)
def test_the_mask_of_the_tokenizer(tmp_path: Path, file: str, content: dict[str, object]) -> None:
    folder = copied(CHECKPOINTS / "sdar-tiny", tmp_path / "m")
    assert files.read_config(folder).mask_id is None
    (folder / file).write_text(json.dumps(content))
    assert files.read_config(folder).mask_id == 305
    assert files.read_config(with_fields(folder, tmp_path / "named", mask_token_id=310)).mask_id == 310


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sdar-tiny", {"attention_bias": True}, "attention_bias: expected false (the releases), got True"),
        ("sdar-tiny", {"block_size": 0}, "block_size: expected a positive whole number, got 0"),
        ("fdv2-tiny", {"bd_size": "32"}, "bd_size: expected a positive whole number, got '32'"),
        ("qwen3-tiny", {"block_size": 4}, "block_size: expected none (every position attends to the whole canvas)"),
        ("qwen3-tiny", {"architectures": ["Qwen3MoeForCausalLM"]}, "got Qwen3-MoE, which is not supported yet"),
        ("qwen3-tiny", {"architectures": ["SDARForCausalLM"]}, "model_type: expected sdar for SDARForCausalLM, got"),
        ("illada-tiny", {"d_model": None, "hidden_size": 64}, "(d_model, ...), got hidden_size: another family"),
    ],
    ids=str,
)
def test_other_variants_are_refused_by_name(name: str, changes: dict[str, object], told: str) -> None:
    given = {field: value for field, value in fields(name, **changes).items() if value is not None}
    with pytest.raises(UsageError) as failure:
        registry.parse_config(given)
    assert told in str(failure.value)
    assert "\n" not in str(failure.value)
