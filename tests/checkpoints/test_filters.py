"""Filters on disk: both formats, the bundled one, and what is no filter."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import dllm_jax
from dllm_jax.checkpoints.filters import from_arrays, load_filter, save_filter, to_arrays
from dllm_jax.config import Config
from dllm_jax.errors import UsageError
from dllm_jax.models.filter import FilterConfig
from dllm_jax.settings import DecodeSettings, FilterSettings


def arrays(*, block_length: int = 8, width: int = 5, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    named = {}
    for number, (inputs, outputs) in enumerate(FilterConfig(block_length, layers, width).layer_sizes, 1):
        named[f"linear{number}.weight"] = rng.normal(size=(outputs, inputs)).astype(np.float32)
        named[f"linear{number}.bias"] = rng.normal(size=outputs).astype(np.float32)
    return named


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize(("layers", "parameters"), [(1, 72), (2, 93), (4, 153)])
def test_both_formats_give_it_back(tmp_path: Path, layers: int, parameters: int) -> None:
    given = arrays(layers=layers)
    assert sum(array.size for array in given.values()) == parameters
    save_filter(tmp_path, from_arrays(given).params)
    for path in (tmp_path, tmp_path / "filter.safetensors", tmp_path / "params"):
        found = load_filter(path)
        assert_same(to_arrays(found.params), given)
        assert (found.config.block_length, found.config.num_layers) == (8, layers)
    (tmp_path / "filter.safetensors").rename(tmp_path / "other.safetensors")
    assert_same(to_arrays(load_filter(tmp_path).params), given)


def test_the_published_size_is_bundled() -> None:
    bundled = load_filter("filter-tiny")
    assert bundled.config == FilterConfig(block_length=32, num_layers=2, width=32)
    assert sum(array.size for array in to_arrays(bundled.params).values()) == 2112


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"linear2.weight": np.ones((8, 6))}, "linear2.weight [8, 6]"),
        ({"linear2.bias": None}, "expected the arrays of a filter"),
        (
            {"linear3.weight": np.ones((8, 5))},
            "expected the arrays of a filter linear1.bias [5], linear1.weight [5, 8], l",
        ),
        ({"linear1.weight": None}, "filter.path: {path}: expected linear1.weight with two axes, got linear1.bias [5]"),
        ({"mean": np.ones(1)}, "mean [1]"),
        (
            {"linear1.bias": np.ones(5, np.int64)},
            "expected linear1.bias to hold finite floating-point numbers, got int64",
        ),
        (
            {"linear1.bias": np.full(5, np.nan)},
            "expected linear1.bias to hold finite floating-point numbers, got float64",
        ),
        ({"linear1.weight": np.ones((0, 8))}, "expected linear1.weight with two axes"),
    ],
)
def test_arrays_that_are_no_filter(tmp_path: Path, changes: dict[str, np.ndarray | None], expected: str) -> None:
    path = tmp_path / "filter.safetensors"
    given = {name: array for name, array in (arrays() | changes).items() if array is not None}
    save_file(given, path)
    with pytest.raises(UsageError) as caught:
        load_filter(path)
    assert expected.format(path=path) in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"filter\.path: expected a file, a folder or one of filter-tiny, got 'nowhere'"
    ):
        load_filter("nowhere")
    with pytest.raises(UsageError, match="expected a complete Orbax checkpoint"):
        load_filter(tmp_path)
    save_file(arrays(), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-1])
    with pytest.raises(UsageError, match="expected a complete safetensors file"):
        load_filter(tmp_path)


def test_a_decode_wants_the_filter_of_its_blocks() -> None:
    model = dllm_jax.load_model("llada-tiny")
    decode = DecodeSettings(policy="learn2pd", gen_length=16, block_length=16)
    with pytest.raises(
        UsageError, match=r"filter\.path: expected the filter that decode\.policy learn2pd needs, got n"
    ):
        dllm_jax.decode(model, [[1, 2]], Config(decode=decode))
    with pytest.raises(UsageError, match=r"decode\.block_length: expected 32, as the filter has it, got 16"):
        dllm_jax.decode(model, [[1, 2]], Config(decode=decode, filter=FilterSettings("filter-tiny")))
    with pytest.raises(UsageError, match=r"filter_params: expected linear1\.weight with two axes, got nothing"):
        dllm_jax.decode(model, [[1, 2]], Config(decode=decode), filter_params={})
