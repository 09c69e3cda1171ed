"""The Python API with arguments of the wrong type, shape or size: refused by name, nothing clamped."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import dllm_jax
from configs import vanilla
from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return dllm_jax.load_model("llada-tiny")


def decode(model: Any, prompts: Any, **others: Any) -> np.ndarray:
    config = vanilla.get_config()
    config.decode.gen_length = config.decode.block_length = 8
    return dllm_jax.decode(model, prompts, config, **others).tokens_BG


FUNCTIONS = [(decode, "prompts"), (dllm_jax.logits, "tokens_BL")]


@pytest.mark.parametrize(("function", "name"), FUNCTIONS, ids=["decode", "logits"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", ": expected rows of token ids, got 'abc' (str)"),
        (b"abc", ": expected rows of token ids, got b'abc' (bytes)"),
        (None, ": expected rows of token ids, got None (NoneType)"),
        ({1: [2]}, ": expected rows of token ids, got {1: [2]} (dict)"),
        (np.array(5), ": expected rows of token ids, got array(5) (ndarray)"),
        ([], ": expected at least one row of token ids, got none"),
        (np.zeros((0, 3), np.int32), ": expected at least one row of token ids, got none"),
        (["text"], "[0]: expected token ids, got 'text' (str)"),
        ([1, 3, 70], "[0]: expected token ids, got 1 (int)"),
        (np.array([1, 3, 70]), "[0]: expected token ids, got 1 (int)"),
        ([[1], []], "[1]: expected at least one token id, got none"),
        ([[1, 4.7]], "[0][1]: expected an integer, got 4.7 (float)"),
        ([[1, True]], "[0][1]: expected an integer, got True (bool)"),
        ([[1, np.bool_(True)]], "[0][1]: expected an integer, got np.True_"),
        ([[1, "3"]], "[0][1]: expected an integer, got '3' (str)"),
        (np.array([[1.0]]), "[0][0]: expected an integer, got 1.0 (float)"),
        (jnp.array([[True]]), "[0][0]: expected an integer, got True (bool)"),
        (np.zeros((1, 2, 2), np.int32), "[0][0]: expected an integer, got [0, 0] (list)"),
        ([[1, 3], [1, -1]], "[1][1]: expected an id from 0 to 511, got -1"),
        ([[1, 3, 9999]], "[0][2]: expected an id from 0 to 511, got 9999"),
        ([[2**70]], f"[0][0]: expected an id from 0 to 511, got {2**70}"),
        (np.array([[2**63]], np.uint64), f"[0][0]: expected an id from 0 to 511, got {2**63}"),
    ],
)
def test_no_rows_of_token_ids(model: Model, function: Callable[..., Any], name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        function(model, value)
    assert str(caught.value).startswith(name + message)


def test_too_long_for_the_model(model: Model) -> None:
    with pytest.raises(UsageError, match=r"tokens_BL: expected rows of 1 to 1152 valid tokens, got 1200"):
        dllm_jax.logits(model, [[1] * 1200])
    with pytest.raises(UsageError, match=r"prompts\[1\]: prompt: expected at most 1144 tokens"):
        decode(model, [[1], [1] * 1145])


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        ([[1, 1]], r"valid_BL: expected the shape of tokens_BL \(1, 3\), got \(1, 2\)"),
        ([[1], [1, 1]], r"valid_BL: expected the shape of tokens_BL \(1, 3\), got \[\[1\], "),
        ([[0, 1, 2]], r"valid_BL: expected booleans, got \[\[0, 1, 2\]\]"),
        ([[0.0, 1.0, 1.0]], r"valid_BL: expected booleans, got "),
        ([[0, 0, 0]], r"tokens_BL: expected rows of 1 to 1152 valid tokens, got 0"),
    ],
)
def test_no_mask_of_valid_tokens(model: Model, valid: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dllm_jax.logits(model, [[1, 3, 4]], valid)


def test_ragged_rows_have_no_logits(model: Model) -> None:
    with pytest.raises(UsageError, match=r"tokens_BL: expected rows of one length, got \[1, 2\]"):
        dllm_jax.logits(model, [[1, 3], [1]])


@pytest.mark.parametrize("function", [decode, dllm_jax.logits])
def test_a_path_is_no_model(function: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"model: expected a model from load_model, got 'llada-tiny' \(str\)"):
        function("llada-tiny", [[1]])


def test_other_arguments_have_types_too(model: Model) -> None:
    with pytest.raises(UsageError, match=r"config: expected a Config or ConfigDict, got \{\} \(dict\)"):
        dllm_jax.decode(model, [[1]], {})
    for name in ("verifier", "filter_params"):
        with pytest.raises(UsageError, match=rf"{name}: expected .*, got 'x' \(str\)"):
            decode(model, [[1]], **{name: "x"})


def test_integer_arrays_are_rows(model: Model) -> None:
    row = [1, 3, 70, 4]
    tokens, logits = decode(model, [row]), dllm_jax.logits(model, [row])
    for same in (
        np.array([row]),
        np.array([row], np.uint8),
        jnp.array([row]),
        [np.array(row)],
        (tuple(row),),
        [[np.int64(1), jnp.int32(3), 70, 4]],
    ):
        np.testing.assert_array_equal(decode(model, same), tokens)
        np.testing.assert_array_equal(dllm_jax.logits(model, same), logits)
    padded = dllm_jax.logits(model, [[0, *row]], [[0, 1, 1, 1, 1]])  # a tokenizer's attention_mask
    np.testing.assert_allclose(padded[:, 1:], logits, rtol=0, atol=1e-4)
