"""Hugging Face folders: round trips, sharded files, streaming, and every way in which a folder can be wrong."""

import dataclasses
import json
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

from dllm_jax.checkpoints import hf, layout, load
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from tests.checkpoints.folders import (
    GQA,
    SHARDED,
    TINY,
    copied,
    header_names,
    in_dtype,
    same_bits,
    tensors,
    with_fields,
    with_tensors,
)
from tests.traces import GOLDENS

DREAM = GOLDENS / "checkpoints" / "dream-tiny"
HEAD = "model.transformer.ff_out.weight"
Q0, K0 = (f"model.transformer.blocks.0.{name}_proj.weight" for name in "qk")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("source", [TINY, GQA], ids=lambda path: path.name)
def test_round_trip_bit_for_bit(source, dtype, tmp_path):
    source = in_dtype(source, tmp_path / "source", dtype)
    hf.export_hf(load_model(source, dtype="keep"), tmp_path / "target")
    assert same_bits(tensors(source), tensors(tmp_path / "target"))


def as_stacked(monkeypatch):
    """Models that are loaded have all layers in one array, as on TPUs."""
    tuned = load.tuned
    monkeypatch.setattr(
        load, "tuned", lambda *args, **kwargs: dataclasses.replace(tuned(*args, **kwargs), stacked=True)
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("source", [GQA, DREAM], ids=lambda path: path.name)
def test_stacked_layers_are_written_one_by_one(source, dtype, tmp_path, monkeypatch):
    source, target = in_dtype(source, tmp_path / "source", dtype), tmp_path / "target"
    target.mkdir()
    listed = arrays(load_model(source, dtype="keep"))
    with monkeypatch.context() as patch:
        as_stacked(patch)
        stacked = load_model(source, dtype="keep", mesh=make_mesh(fsdp=2, tensor=2))
        assert "layers.attention.qkv" in layout.flatten(stacked.params)
        hf.write_tensors(stacked, target)
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
        assert same_bits(arrays(load_model(target, dtype="keep")), arrays(stacked))
    assert same_bits(tensors(source), tensors(target))
    assert same_bits(arrays(load_model(target, dtype="keep")), listed)


def arrays(model):
    return {path: np.asarray(array) for path, array in layout.flatten(model.params).items()}


def test_export_is_split_below_the_limit_with_an_index(tmp_path):
    source = copied(GQA, tmp_path / "source")
    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text("{}")
    hf.export_hf(load_model(source), tmp_path / "target", shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "target").iterdir())
    shards = [name for name in files if name.endswith(".safetensors")]
    assert files == sorted([*shards, "chat_template.jinja", "config.json", hf.INDEX, "tokenizer.json"])
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "target" / hf.INDEX).read_text())
    assert {shard: header_names(tmp_path / "target" / shard) for shard in shards} == {
        shard: [name for name, file in index["weight_map"].items() if file == shard] for shard in shards
    }
    written = tensors(tmp_path / "target")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert same_bits(tensors(source), written)


def test_export_names_the_dtype_it_wrote(tmp_path):
    source = with_fields(TINY, tmp_path / "source", torch_dtype="float32")
    hf.export_hf(load_model(source, dtype="bfloat16"), tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_needs_a_config_and_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="expected an empty folder"):
        hf.export_hf(load_model(TINY), copied(GQA, tmp_path / "full"))
    with pytest.raises(UsageError, match="random weights"):
        hf.export_hf(dataclasses.replace(load_model(TINY), path=""), tmp_path / "target")


def test_query_heads_lie_beside_their_key_head():
    model, stored = load_model(GQA), tensors(GQA)
    qkv = np.asarray(layout.flatten(model.params)["layers.0.attention.qkv"])  # [D, K, G + 2, H]
    heads, groups, head_dim = 4, 2, 16
    assert qkv.shape == (64, heads // groups, groups + 2, head_dim)
    for n in range(heads):
        expected = stored[Q0][n * head_dim : (n + 1) * head_dim].T
        np.testing.assert_array_equal(qkv[:, n // groups, n % groups], expected)
    np.testing.assert_array_equal(qkv[:, 1, groups], stored[K0][head_dim:].T)


@pytest.mark.parametrize("kind", ["qkv_bias", "qkv", "out", "gate_up", "down", "head", "embedding", "scale"])
def test_splitting_undoes_fusing(kind):
    shape = {"qkv": (6, 2, 5, 4), "qkv_bias": (2, 5, 4), "out": (2, 3, 4, 6), "gate_up": (6, 2, 8), "scale": (6,)}.get(
        kind, (8, 6)
    )
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parts = layout.split(kind, array)
    assert [part.shape for part in parts] == layout.tensor_shapes(kind, shape)
    np.testing.assert_array_equal(layout.fuse(kind, parts, shape=shape, dtype=np.dtype(np.float32)), array)
    if kind == "qkv_bias":
        assert [part.shape for part in parts] == [(24,), (8,), (8,)]


def test_one_parameter_at_a_time(monkeypatch):
    spy = mock.Mock()
    spy.fuse.side_effect, spy.place.side_effect = layout.fuse, jax.make_array_from_callback
    monkeypatch.setattr("dllm_jax.checkpoints.files.IN_FLIGHT_BYTES", 1)  # no room for another one
    monkeypatch.setattr(layout, "fuse", spy.fuse)
    monkeypatch.setattr(jax, "make_array_from_callback", spy.place)
    paths = list(layout.flatten(load_model(GQA).params))
    assert [call.args[0] for call in spy.fuse.mock_calls] == paths
    assert [name for name, _, _ in spy.mock_calls] == ["fuse", "place"] * len(paths)


def test_tensors_are_memory_mapped():
    header = hf.read_headers(SHARDED)
    assert len(header) == len(hf.read_headers(TINY))
    assert all(isinstance(tensor.map(), np.memmap) for tensor in header.values())


def test_harmless_buffers_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_model(with_tensors(TINY, tmp_path / "m", lambda edited: edited.update({name: np.ones(8, np.int64)})))


def remove(*names):
    return lambda edited: [edited.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (remove(HEAD), ["1 missing", HEAD]),
        (lambda t: t.update({"extra.weight": np.ones(3)}), ["1 unexpected", "extra.weight"]),
        (lambda t: t.update({Q0: t[Q0][:8]}), ["1 wrong shape", Q0, "[64, 64]", "[8, 64]"]),
        (lambda t: (t.pop(HEAD), t.update({"x": np.ones(3), K0: t[K0].T[:3]})), [HEAD, "1 unexpected", K0]),
        (lambda t: t.update({Q0: t[Q0].astype(np.int8)}), [Q0, "I8"]),
        (lambda t: [t.pop(name) for name in list(t)[:12]], ["12 missing", "and 4 more"]),
    ],
    ids=["missing", "unexpected", "shape", "together", "dtype", "abbreviated"],
)
def test_wrong_tensors_are_named(change, told, tmp_path):
    refused(with_tensors(GQA, tmp_path / "m", change), *told)


def test_nothing_is_read_before_the_check(monkeypatch, tmp_path):
    folder = with_tensors(TINY, tmp_path / "m", remove(HEAD))
    monkeypatch.setattr(hf.Tensor, "map", lambda tensor: pytest.fail("weights were read"))
    refused(folder, HEAD)


@pytest.mark.parametrize("keep", [0, 4, 300, 100_000])
def test_a_truncated_file_is_named(keep, tmp_path):
    file = copied(TINY, tmp_path / "m") / hf.SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path / "m", hf.SINGLE, "complete safetensors")


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>\n", b"\x10\0\0\0\0\0\0\0{not json......}"])
def test_a_file_that_is_no_safetensors_is_named(start, tmp_path):
    (copied(TINY, tmp_path / "m") / hf.SINGLE).write_bytes(start)
    refused(tmp_path / "m", hf.SINGLE, "complete safetensors")


def test_weights_that_are_not_there(tmp_path):
    (copied(TINY, tmp_path / "m") / hf.SINGLE).unlink()
    refused(tmp_path / "m", hf.SINGLE, hf.INDEX, "got no such file")


def test_an_index_with_absent_files(tmp_path):
    (copied(SHARDED, tmp_path / "m") / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path / "m", hf.INDEX, "model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda index: index["weight_map"].update({HEAD: "model-00001-of-00003.safetensors"}), [HEAD, "model-00001"]),
        (lambda index: index["weight_map"].update({HEAD: "../llada-tiny/model.safetensors"}), ["in the folder"]),
        (lambda index: index["weight_map"].pop(HEAD), []),  # a file's own header is enough
        (lambda index: index.pop("weight_map"), ["weight_map"]),
        (lambda index: index.update(weight_map={"a": 1}), ["weight_map"]),
    ],
    ids=["wrong-file", "outside", "unlisted", "none", "types"],
)
def test_an_index_that_disagrees_with_its_files(edit, told, tmp_path):
    path = copied(SHARDED, tmp_path / "m") / hf.INDEX
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    if told:
        refused(tmp_path / "m", hf.INDEX, *told)
    else:
        load_model(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_malformed_config_is_named(text, tmp_path):
    (copied(TINY, tmp_path / "m") / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "m", "config.json", "expected")


def test_an_absent_config_is_named(tmp_path):
    (copied(TINY, tmp_path / "m") / "config.json").unlink()
    refused(tmp_path / "m", "expected config.json", hf.SINGLE)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"d_model": "64"}, "numbers"),
        ({"n_heads": 0}, "numbers"),
        ({"n_layers": 0}, "num_layers"),
        ({"n_layers": 2.5}, "num_layers"),
        ({"mlp_hidden_size": -1}, "mlp_dim"),
        ({"mask_token_id": 320}, "mask_token_id in the vocabulary of 320, got 320"),
        ({"d_model": None}, "d_model"),
    ],
)
def test_wrong_config_fields_are_named(fields, told, tmp_path):
    refused(with_fields(TINY, tmp_path / "m", **fields), "config.json", told)


def refused(folder, *told):
    """Loading fails with one line that names the folder and everything in `told`."""
    with pytest.raises(UsageError) as failure:
        load_model(folder)
    message = str(failure.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in told:
        assert part in message, message
