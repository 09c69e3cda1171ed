"""Folders that people have: those that are read, and those that are refused in one line before weights are read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax.checkpoints import convert, hf
from dllm_jax.models import registry
from tests.cases.conftest import Ran, Run
from tests.checkpoints.folders import with_fields, with_tensors

SHORT = ("input.prompt=x", "decode.gen_length=8")
Q0 = "model.transformer.blocks.0.q_proj"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
SUPPORTED = f"expected a model_type among {', '.join(sorted(registry.FAMILIES))}, got "
QUANTISED = "config.json field quantization_config: expected none, got "


def answer(ran: Ran) -> list[int]:
    assert ran.code == 0, ran.err
    (row,) = (json.loads(line) for line in ran.out.splitlines())
    assert len(row["output_ids"]) == 8
    return row["output_ids"]


@pytest.fixture
def decode(run: Run) -> Callable[[Path | str], Ran]:
    return lambda folder: run(f"model.path={folder}", *SHORT, "decode.block_length=8", config="threshold")


@pytest.mark.parametrize(
    "name",
    [
        "llada",
        "llada-sharded",
        "llada-invfreq",
        "llada-fp16",
        "llada-dtype5",
        "llada-tied-head",
        "llada-eoslist",
        "llada-optimizer-beside",
        "llada-embsize",
        "dream",
        "diffucoder",
        "dream-random",
        "dream-nobias",
        "dream-tokv5",
    ],
)
def test_models_that_are_read(decode, checkpoints: Path, name: str) -> None:
    answer(decode(checkpoints / name))


def test_a_model_of_blocks_is_read(run: Run, decode, checkpoints: Path) -> None:
    """It keeps its own cache, and no other."""
    place = f"model.path={checkpoints / 'fastdllmv2'}"
    answer(run(place, *SHORT, config="fast_dllm_v2"))
    answer(run(place, *SHORT, "decode.cache=auto", config="threshold"))
    refused = decode(checkpoints / "fastdllmv2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert (
        "decode.cache: expected one of none, block with a model of the family Fast_dLLM_Qwen, got 'dual'" in refused.err
    )


@pytest.mark.parametrize("name", ["qwen-v5", "qwen-tie-absent"])
def test_verifiers_that_are_read(run: Run, checkpoints: Path, name: str) -> None:
    places = (f"model.path={checkpoints / 'dream'}", f"verifier.path={checkpoints / name}")
    answer(run(*places, *SHORT, config="apd"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llada-stale", "expected every tensor in its file, got none for model.transformer.blocks.9.q_proj.weight"),
        ("llada-both", "expected model.safetensors or model.safetensors.index.json, got both: remove the one"),
        ("llada-fp8", f"{QUANTISED}'fp8'"),
        ("llada-awq", f"{QUANTISED}'awq'"),
        ("llada-quantcfg", f"{QUANTISED}'bitsandbytes'"),
        ("llada-adapter-beside", "adapter_model.safetensors beside the weights: merge it into the model"),
        ("adapter-only", "adapter_model.safetensors alone: merge it into the model"),
        ("llada-nomask", "mask_token_id, got none (add the id of [MASK] to config.json)"),
        ("llada-ropescaling", "field rope_scaling: expected none (plain rotary positions; scaled ones are"),
        ("dream-block", "field block_size: expected none (every position attends to the whole canvas), got 32"),
        ("qwen-v5-sliding", "field layer_types: expected only 'full_attention', got 'sliding_attention'"),
        (
            "llada-moe",
            "expected the tensors of 2 layers (config.json), got model.transformer.blocks.0.attn_norm.weight",
        ),
        ("llada2", "expected the field(s) intermediate_size, max_position_embeddings, moe_intermediate_size, "),
        ("illada", "expected the fields of LLaDA (d_model, ...), got hidden_size"),
        ("illada-llada", "expected the fields of LLaDA (d_model, ...), got hidden_size"),
        ("sdar", "4 missing: model.layers.0.self_attn.q_norm.weight"),
        ("a2d", f"{SUPPORTED}a2d"),
        ("qwen3", "4 missing: model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_models_that_are_refused(decode, checkpoints: Path, monkeypatch, name: str, told: str) -> None:
    monkeypatch.setattr(hf.Tensor, "map", lambda tensor: pytest.fail("weights were read"))
    error = decode(checkpoints / name).error
    assert told in error
    assert str(checkpoints / name) in error


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_layers": 2000}, "expected the tensors of 2000 layers (config.json), got those of 2"),
        ({"n_layers": 10**12}, "up to 1048576 for num_layers"),
        ({"n_layers": "2"}, "for num_layers, got '2'"),
        ({"d_model": 2**20}, "wrong shape"),
        ({"n_kv_heads": 0}, "expected numbers that describe a model"),
        ({"n_heads": 64}, "expected an even head_dim"),
        ({"vocab_size": -1}, "field vocab_size: expected 1 to embedding_size (512), got -1"),
        ({"embedding_size": 500}, "field vocab_size: expected 1 to embedding_size (500), got 512"),
        ({"rope_theta": -1}, "field rope_theta: expected a positive number"),
        ({"rope_scaling": {"factor": 2}}, "field rope_scaling: expected none"),
        ({"rope_scaling": "linear"}, "field rope_scaling: expected none"),
        ({"sliding_window": 128}, "field sliding_window"),
        ({"bd_size": 32}, "block diffusion"),
        ({"architectures": ["SDARForCausalLM"]}, "expected sdar for SDARForCausalLM"),
        ({"weight_tying": "false"}, "expected true or false"),
        ({"weight_tying": True}, "expected a head equal to the embedding"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(decode, checkpoints: Path, tmp_path: Path, fields: dict, told: str) -> None:
    assert told in decode(with_fields(checkpoints / "llada", tmp_path / "m", **fields)).error


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (f"{Q0}.lora_A.default.weight", np.zeros((8, 64)), "got those of an adapter"),
        (f"{Q0}.hada_w1_a", np.zeros((64, 8)), "got those of an adapter"),
        (f"{Q0}.base_layer.weight", np.zeros((64, 64)), "merge it into the model"),
        (f"{Q0}.qweight", np.zeros((8, 64), np.int32), "got quantised ones"),
        (f"{Q0}.weight.absmax", np.zeros(8), "dequantised"),
        (f"{Q0}.weight", np.zeros((64, 64), np.int8), "(I8): save the dequantised weights in bfloat16"),
    ],
)
def test_tensors_of_another_kind(decode, checkpoints: Path, tmp_path: Path, name, tensor, told) -> None:
    folder = with_tensors(checkpoints / "llada", tmp_path / "m", lambda tensors: tensors.update({name: tensor}))
    assert told in decode(folder).error


def pickled(folder: Path) -> None:
    (folder / hf.INDEX).unlink()
    for shard in folder.glob("model-*"):
        shard.rename(shard.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (pickled, "-00003.bin: save the model as safetensors"),
        (lambda folder: (folder / hf.INDEX).unlink(), "got only model-00001-of-00003.safetensors, model-00002"),
        (lambda folder: (folder / hf.INDEX).write_text('{"weight_map": '), "expected JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "expected JSON"),
        (lambda folder: (folder / "config.json").unlink(), "expected config.json"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").write_text(POINTER), "run git lfs pull"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "git-lfs pointers: tokenizer.json"),
    ],
    ids=["bin", "no-index", "broken-index", "deep-config", "no-config", "lfs-weights", "lfs-tokenizer"],
)
def test_a_folder_that_is_not_whole(decode, checkpoints: Path, tmp_path: Path, damage, told: str) -> None:
    shutil.copytree(checkpoints / "llada-sharded", tmp_path / "m")
    damage(tmp_path / "m")
    assert told in decode(tmp_path / "m").error


def test_a_tokenizer_is_read_beside_weights_that_are_not_fetched(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "llada", tmp_path / "m"))
    for name in (hf.SINGLE, "tokenizer.model"):  # neither is read
        (folder / name).write_text(POINTER)
    settings = (f"model.path={checkpoints / 'llada'}", f"tokenizer.path={folder}", *SHORT, "decode.block_length=8")
    answer(run(*settings, config="threshold"))
    (folder / "tokenizer.json").write_text(POINTER)
    assert "git-lfs pointers: tokenizer.json (run git lfs pull)" in run(*settings).error


def test_a_folder_of_an_index_without_tensors(decode, checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "llada-sharded", tmp_path / "m"))
    (folder / hf.INDEX).write_text('{"weight_map": {}}')
    assert "expected the tensors of 2 layers (config.json), got none" in decode(folder).error


def test_paths_that_are_no_folder(decode, checkpoints: Path) -> None:
    told = "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct"
    assert told in decode("GSAI-ML/LLaDA-8B-Instruct").error
    assert told in decode("https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct").error
    assert "expected a folder or one of llada-tiny, verifier-tiny, got 'xxx" in decode("x" * 5000).error
    assert f"is in, {checkpoints / 'llada'}\n" in decode(checkpoints / "llada" / hf.SINGLE).error


@pytest.fixture
def cache(checkpoints: Path, tmp_path: Path) -> Path:
    """`llada-sharded` as Hugging Face's downloads lie: a snapshot of links to blobs."""
    folder = tmp_path / "models--GSAI-ML--LLaDA"
    snapshot = folder / "snapshots" / "abc"
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted((checkpoints / "llada-sharded").iterdir())):
        shutil.copy(path, folder / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    return folder


def test_a_cache_of_hugging_face_is_a_model(decode, run: Run, checkpoints: Path, cache: Path, tmp_path: Path) -> None:
    expected = answer(decode(checkpoints / "llada-sharded"))
    assert answer(decode(cache)) == expected
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "another").mkdir()
    assert answer(decode(cache)) == expected
    assert answer(decode(cache / "snapshots" / "abc")) == expected
    convert.convert(cache, tmp_path / "converted", to="orbax", dtype="keep", overwrite=False)
    assert answer(decode(tmp_path / "converted")) == expected
    answer(
        run(
            f"model.path={checkpoints / 'llada'}",
            f"tokenizer.path={cache}",
            *SHORT,
            "decode.block_length=8",
            config="threshold",
        )
    )


def test_a_cache_that_is_not_whole(decode, cache: Path) -> None:
    assert "expected the folder of one model, got a cache with models--GSAI-ML--LLaDA" in decode(cache.parent).error
    (cache / "refs" / "main").write_text("gone")
    assert "got abc (refs/main is gone: download again)" in decode(cache).error
    (cache / "blobs" / "0").unlink()
    assert "links to files that are not there: config.json" in decode(cache / "snapshots" / "abc").error


def test_a_tied_model_may_store_its_head(decode, checkpoints: Path, tmp_path: Path) -> None:
    """With the head or without it, in another dtype, or without the field that says so: the same answer."""
    head, embedding = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    expected = answer(decode(checkpoints / "llada-tied-head"))
    for name, change in {
        "wider": lambda tensors: tensors.update({head: tensors[embedding].astype(np.float32)}),
        "head-only": lambda tensors: tensors.pop(embedding),
        "without": lambda tensors: tensors.pop(head),
    }.items():
        assert answer(decode(with_tensors(checkpoints / "llada-tied-head", tmp_path / name, change))) == expected
    silent = with_fields(tmp_path / "without", tmp_path / "silent", weight_tying=None)
    assert answer(decode(silent)) == expected
    tensors = load_file(tmp_path / "wider" / hf.SINGLE)
    tensors[head][511, 63] += 1
    save_file(tensors, tmp_path / "wider" / hf.SINGLE)
    assert "expected a head equal to the embedding" in decode(tmp_path / "wider").error
