"""Loading onto meshes: every device gets its part, and the values do not depend on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import mesh
from dllm_jax.checkpoints import layout
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model, resolve
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from tests.checkpoints.folders import GQA, TINY, copied

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


@pytest.fixture(scope="module", params=["hf", "converted"])
def folder(request, tmp_path_factory):
    """The same model in both formats."""
    if request.param == "hf":
        return TINY
    target = tmp_path_factory.mktemp("load") / "tiny"
    convert(TINY, target, to="orbax", dtype="keep", overwrite=False)
    return target


@pytest.mark.parametrize(
    ("shape", "split_by_fsdp"), [*((shape, False) for shape in MESHES), ((2, 2, 2), True)], ids=str
)
def test_meshes(folder, shape, split_by_fsdp, monkeypatch):
    data, fsdp, tensor = shape
    if split_by_fsdp:  # as if a device could not hold the weights otherwise
        monkeypatch.setattr(mesh, "decoding_rules", lambda *_: mesh.DECODING_SPLIT)
    expected = layout.flatten(load_model(TINY).params)
    model = load_model(folder, mesh=make_mesh(data=data, fsdp=fsdp, tensor=tensor))
    of_layers = fsdp * tensor if split_by_fsdp else tensor
    split = {"embedding": tensor, "layers.0.attention.qkv": of_layers, "layers.2.mlp.down": of_layers}
    for path, param in layout.flatten(model.params).items():
        np.testing.assert_array_equal(param, expected[path])
        assert len(param.addressable_shards) == data * fsdp * tensor
        parts = 1 if path.endswith("scale") else split.get(path)
        for shard in param.addressable_shards if parts else ():
            assert shard.data.size * parts == param.size, path


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 4)], ids=str)
def test_too_few_kv_heads_are_copied(shape):
    """Two key/value heads of two query heads each become four of one."""
    data, fsdp, tensor = shape
    params = layout.flatten(load_model(GQA, mesh=make_mesh(data=data, fsdp=fsdp, tensor=tensor)).params)
    given = np.asarray(layout.flatten(load_model(GQA).params)["layers.0.attention.qkv"])
    qkv = params["layers.0.attention.qkv"]
    assert (given.shape, qkv.shape) == ((64, 2, 4, 16), (64, 4, 3, 16))
    assert qkv.addressable_shards[0].data.shape == (64, 1, 3, 16)
    np.testing.assert_array_equal(qkv[:, :, 0], given[:, :, :2].reshape(64, 4, 16))
    np.testing.assert_array_equal(qkv[:, :, 1:], np.repeat(given[:, :, 2:], 2, axis=1))
    assert params["layers.0.mlp.down"].addressable_shards[0].data.shape == (192 // tensor, 64)


def test_a_mesh_may_take_fewer_devices_and_none_takes_the_first():
    assert load_model(GQA, mesh=make_mesh(fsdp=2)).params["embedding"][...].sharding.num_devices == 2
    assert load_model(GQA).params["embedding"][...].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", "float32"),
        ("keep", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
    ],
)
def test_dtypes(dtype, expected):
    model = load_model("llada-tiny", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(expected)}


@pytest.mark.parametrize("dtype", ["int8", "float64", ""])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match=r"model\.dtype: expected"):
        load_model(TINY, dtype=dtype)


def test_a_folder_wins_over_a_bundled_name(tmp_path, monkeypatch):
    copied(GQA, tmp_path / "llada-tiny")
    bundled = resolve("llada-tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("llada-tiny").resolve() == tmp_path / "llada-tiny"
    assert bundled.name == "llada-tiny"
    assert bundled.is_absolute()


@pytest.mark.parametrize("path", ["", "nowhere", "../assets", str(TINY / "config.json")])
def test_no_such_checkpoint(path):
    with pytest.raises(UsageError, match=r"model\.path: expected a folder or one of llada-tiny.*, got"):
        load_model(path)
