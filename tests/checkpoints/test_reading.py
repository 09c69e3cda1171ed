"""Weights are read in parts, by several threads, within a bound of host memory; what is read does not depend on it."""

import threading
import weakref
from collections.abc import Callable

import jax
import numpy as np
import pytest

from dllm_jax import mesh as meshes
from dllm_jax.bench import loading
from dllm_jax.checkpoints import convert, files, hf, layout, store
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.memory import placed
from dllm_jax.mesh import make_mesh, weight_shardings
from dllm_jax.models.model import abstract_model
from tests.checkpoints.folders import GQA, SHARDED, TINY, copied, tensors
from tests.traces import GOLDENS

DREAM, WIDE, QWEN = (GOLDENS / "checkpoints" / name for name in ("dream-tiny", "dream-tiny-wide", "qwen2-tiny"))


def expected_params(folder, wanted):
    """The parameters, each assembled as a whole from its tensors."""
    _, found = hf.read_tensors(folder, files.read_config(folder))
    arrays = {}
    for path, leaf in wanted.items():
        arrays[path] = np.empty(leaf.shape, leaf.dtype)
        for part, tensor in zip(layout.parts(path, arrays[path]), found[path], strict=True):
            part.view[...] = np.array(tensor.map()).reshape(part.view.shape)
    return arrays


def wanted_on(folder, mesh, dtype=np.float32):
    """What `load_model` asks for before it copies key/value heads, and the tensors there are."""
    config, found = hf.read_tensors(folder, files.read_config(folder))
    _, abstract = abstract_model(config, dtype=np.dtype(dtype))
    return layout.flatten(placed(abstract, weight_shardings(abstract, mesh))), found


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[hf.Tensor, int], None]], None]:
    """Calls a function with the tensor and the bytes of everything that is read."""
    read = hf.Tensor.__getitem__

    def install(seen: Callable[[hf.Tensor, int], None]) -> None:
        def reading(tensor: hf.Tensor, box: layout.Index) -> np.ndarray:
            part = read(tensor, box)
            seen(tensor, part.nbytes)
            return part

        monkeypatch.setattr(hf.Tensor, "__getitem__", reading)

    return install


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("folder", [TINY, GQA, SHARDED, DREAM, WIDE, QWEN], ids=lambda path: path.name)
def test_every_part_is_that_of_the_whole(folder, shape, dtype, monkeypatch):
    monkeypatch.setattr(meshes, "decoding_rules", lambda *_: meshes.DECODING_SPLIT)
    monkeypatch.setattr(layout, "JOB_ELEMENTS", 1500)  # so that every tensor is several jobs
    wanted, found = wanted_on(folder, make_mesh(**dict(zip(meshes.MESH_AXES, shape, strict=True))), dtype)
    expected = expected_params(folder, wanted)
    read = dict(hf.read_params(found, wanted=wanted, limit=files.IN_FLIGHT_BYTES))
    assert list(read) == list(wanted)
    for path, param in read.items():
        assert (param.dtype, param.sharding) == (expected[path].dtype, wanted[path].sharding)
        for shard in param.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[path][shard.index].tobytes(), path


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_what_the_devices_of_a_process_hold_is_read_once(shape, watch):
    bytes_read = []
    watch(lambda _, count: bytes_read.append(count))
    load_model(TINY, mesh=make_mesh(**dict(zip(meshes.MESH_AXES, shape, strict=True))))
    assert sum(bytes_read) == sum(tensor.nbytes for tensor in tensors(TINY).values())


@pytest.mark.parametrize(
    "path",
    [
        "embedding",
        "head",
        "final_norm.scale",
        *(f"layers.1.{name}" for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")),
    ],
)
def test_of_a_part_no_more_is_read(path, watch, monkeypatch):
    """As in a process that holds one device of the mesh."""
    monkeypatch.setattr(meshes, "decoding_rules", lambda *_: meshes.DECODING_SPLIT)
    bytes_read = []
    watch(lambda _, count: bytes_read.append(count))
    wanted, found = wanted_on(TINY, make_mesh(data=2, fsdp=2, tensor=2))
    leaf, whole = wanted[path], expected_params(TINY, {path: wanted[path]})[path]
    for index in leaf.sharding.devices_indices_map(leaf.shape).values():
        bytes_read.clear()
        part = layout.fuse(path, found[path], shape=leaf.shape, dtype=leaf.dtype, index=index)
        assert sum(bytes_read) == part.nbytes
        assert part.tobytes() == whole[index].tobytes()
    assert len(bytes_read) == len(found[path])
    assert part.size == whole.size // {"embedding": 2, "head": 2, "final_norm.scale": 1}.get(path, 4)


def test_a_part_that_is_no_piece_of_a_tensor_is_refused():
    some = (slice(None), slice(0, 2), slice(0, 3), slice(0, 2))
    with pytest.raises(ValueError, match="one piece of the tensor"):
        layout.tensor_boxes("qkv", (6, 2, 5, 4), some)


def test_files_are_read_at_once(watch, monkeypatch):
    monkeypatch.setattr(hf, "READERS", 64)
    files_read, change = set(), threading.Condition()

    def until_all(tensor: hf.Tensor, _: int) -> None:
        with change:
            files_read.add(tensor.file)
            change.notify_all()
            assert change.wait_for(lambda: len(files_read) == 3, timeout=60), "one file waits for another"

    watch(until_all)
    load_model(SHARDED)


@pytest.mark.parametrize("limit", [1, 100_000, 10**6])
def test_what_is_in_flight_stays_within_the_bound(limit, monkeypatch):
    """A part counts from the moment that its memory is there until its parameter is on its devices."""
    monkeypatch.setattr(files, "IN_FLIGHT_BYTES", limit)
    fuse, place = layout.fuse, jax.make_array_from_callback
    held, most, parameters = [], [], []

    def fusing(path, *args, **kwargs):
        part = fuse(path, *args, **kwargs)
        held.append((path, part.nbytes))
        most.append(sum(size for _, size in held))
        parameters.append(len({path for path, _ in held}))
        return part

    def placing(*args):
        array = place(*args)
        first = held[0][0]
        held[:] = [(path, size) for path, size in held if path != first]
        return array

    monkeypatch.setattr(layout, "fuse", fusing)
    monkeypatch.setattr(jax, "make_array_from_callback", placing)
    params = layout.flatten(load_model(TINY, mesh=make_mesh(tensor=4)).params)
    assert not held
    assert max(most) <= max(limit, max(param.nbytes for param in params.values()))
    assert (max(parameters) > 1) == (limit > 1)


def test_a_damaged_shard_is_one_line_and_a_fault_while_reading_ends_it(watch, tmp_path):
    shard = copied(SHARDED, tmp_path / "m") / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"^[^\n]*model-00002-of-00003.safetensors: expected a complete safetensors"):
        load_model(tmp_path / "m")

    def broken(tensor: hf.Tensor, _: int) -> None:
        if tensor.file.name == shard.name:
            raise OSError(5, "Input/output error", str(tensor.file))

    watch(broken)
    with pytest.raises(OSError, match=f"Input/output error.*{shard.name}"):
        load_model(SHARDED)


def test_an_interrupted_conversion_leaves_nothing(watch, tmp_path, capsys):
    def interrupt(tensor: hf.Tensor, _: int) -> None:
        if tensor.file.name == "model-00002-of-00003.safetensors":
            raise KeyboardInterrupt

    watch(interrupt)
    assert convert.main(["convert", f"--source={SHARDED}", f"--target={tmp_path / 'm'}"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_an_export_holds_one_parameter(tmp_path, monkeypatch):
    split, made = layout.split, []

    def splitting(path: str, array: np.ndarray) -> list[np.ndarray]:
        assert sum(tensor() is not None for tensor in made) <= 1  # the last that was written
        result = split(path, array)
        made.extend(weakref.ref(tensor) for tensor in result)
        return result

    monkeypatch.setattr(layout, "split", splitting)
    hf.export_hf(load_model(TINY), tmp_path / "m")
    assert len(made) == len(tensors(TINY))


def test_a_conversion_reads_what_it_writes_next(tmp_path, monkeypatch):
    fuse, save, read, written = layout.fuse, store.ocp.partial.save, [], []

    def fusing(path, *args, **kwargs):
        part = fuse(path, *args, **kwargs)
        read.append((path, part.nbytes))
        return part

    def saving(path, arrays):
        assert [path for path, _ in read] == list(arrays)
        assert len(arrays) == 1 or sum(size for _, size in read) <= 150_000
        written.extend(arrays)
        read.clear()
        save(path, arrays)

    monkeypatch.setattr(convert, "GROUP_BYTES", 150_000)
    monkeypatch.setattr(layout, "fuse", fusing)
    monkeypatch.setattr(store.ocp.partial, "save", saving)
    convert.convert(TINY, tmp_path / "m", to="orbax", dtype="keep", overwrite=False)
    assert written == list(layout.flatten(load_model(TINY).params))


def test_arrays_of_a_converted_folder_are_restored_in_groups(tmp_path, monkeypatch):
    convert.convert(TINY, tmp_path / "m", to="orbax", dtype="keep", overwrite=False)
    groups = []
    grouped = files.grouped
    monkeypatch.setattr(files, "grouped", lambda *args: groups.extend(grouped(*args)) or groups)
    monkeypatch.setattr(files, "IN_FLIGHT_BYTES", 150_000)
    params = layout.flatten(load_model(tmp_path / "m").params)
    expected = layout.flatten(load_model(TINY).params)
    assert [name for group in groups for name in group] == list(params) == list(expected)
    assert all(len(group) == 1 or sum(params[name].nbytes for name in group) <= 150_000 for group in groups)
    assert 1 < len(groups) < len(params)
    assert all(np.asarray(params[name]).tobytes() == np.asarray(expected[name]).tobytes() for name in params)


def test_the_command_that_measures(capsys):
    assert loading.main(["loading", "--path=llada-tiny", "--tensor=2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("llada-tiny: 0.00 GB of weights on 2 cpu, ")
    assert told.endswith(" GB of host memory beside them\n")
    assert loading.main(["loading"]) == 2
    assert capsys.readouterr().err == "error: --path: expected a folder, got none\n"
