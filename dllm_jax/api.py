"""The Python API: load a model, look at its logits, decode prompts."""

import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dllm_jax.checkpoints.load import load_model
from dllm_jax.config import Config, from_config_dict, validate
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.policies.build import companions_of, every_companion
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model, computing, with_causal_block

__all__ = ["decode", "load_model", "logits"]


def logits(
    model: Model,
    tokens_BL: Int[np.ndarray, "B L"] | Sequence[Sequence[int]],
    valid_BL: Bool[np.ndarray, "B L"] | Sequence[Sequence[bool]] | None = None,
    block_length: int | None = None,
) -> Float[np.ndarray, "B L V"]:
    """Raw logits of a forward pass, float32: unshifted, causal for autoregressive models.

    Args:
        model: from `load_model`.
        tokens_BL: token ids.
        valid_BL: False for padding, which no token attends to; positions count the valid tokens. Default: all valid.
        block_length: of the mask of a model that is causal by blocks, counted from a row's first valid token; 0: every
            token sees all others. Default: the model's.

    Raises:
        UsageError: an argument of another type or shape, an id outside the vocabulary, more valid tokens in a row than
            the model takes, or none.
    """
    _check_type(model, "model", Model, "a model from load_model")
    model = _masked(model, block_length)
    rows, config = _rows(tokens_BL, "tokens_BL"), model.config
    _check_ids(rows, "tokens_BL", vocab_size=config.vocab_size)
    if len({len(row) for row in rows}) > 1:
        raise UsageError(f"tokens_BL: expected rows of one length, got {sorted({len(row) for row in rows})}")
    tokens = np.array(rows, np.int32)
    valid = np.ones(tokens.shape, bool) if valid_BL is None else _valid(valid_BL, tokens.shape)
    length_B = valid.sum(axis=1)
    if not (length_B.min() >= 1 and length_B.max() <= config.max_length):
        wrong = length_B.max() if length_B.min() >= 1 else 0
        raise UsageError(f"tokens_BL: expected rows of 1 to {config.max_length} valid tokens, got {wrong}")
    with computing(model.mesh):
        return np.asarray(_logits(model.graphdef, model.params, tokens, valid))


def _masked(model: Model, block_length: int | None) -> Model:
    """The model with the mask that is asked for.

    Raises:
        UsageError: it has only one, or that is no length.
    """
    if block_length is None:
        return model
    config = model.config
    if type(block_length) is not int or block_length < 0:
        raise UsageError(f"block_length: expected a number of at least 0, got {_shown(block_length)}")
    if not config.block_causal and block_length != config.causal_block:
        kind = "causal" if config.causal else "bidirectional"
        raise UsageError(
            f"block_length: expected none or {config.causal_block} (the {config.family} model is {kind}), "
            f"got {block_length}"
        )
    return with_causal_block(model, block_length)


@jax.jit
def _logits(
    graphdef: nnx.GraphDef, params: nnx.State, tokens_BL: Int[Array, "B L"], valid_BL: Bool[Array, "B L"]
) -> Float[Array, "B L V"]:
    module = nnx.merge(graphdef, params)
    positions_BL = jnp.cumsum(valid_BL, axis=1) - 1
    hidden_BLD, _ = module(tokens_BL, positions_BL, real_BS=valid_BL)
    return module.unembed(hidden_BLD).astype(jnp.float32)


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B L"],
    config: Config | ConfigDict,
    verifier: Model | None = None,
    filter_params: Mapping[str, Any] | None = None,
    **companions: Any,
) -> DecodeResult:
    """Decodes prompts of any number and length.

    Args:
        model: a diffusion model from `load_model`.
        prompts: token ids of every prompt: sequences of any lengths, or the rows of an integer array.
        config: settings, of which `decode` and what belongs to the policy are used.
        verifier: a causal model over the same tokens from `load_model`, for the policy `apd`.
        filter_params: the arrays of a filter, linear1.weight [width, block_length], linear1.bias [width] and so on, for
            the policy `learn2pd`; default: those in `filter.path`.
        companions: networks of other policies, by the `argument` of their companions.

    Returns:
        Tokens and counts per prompt, in the order given.

    Raises:
        UsageError: a wrong setting, or an argument of another type, named with the index of the prompt.
    """
    _check_type(model, "model", Model, "a model from load_model")
    _check_type(config, "config", Config | ConfigDict, "a Config or ConfigDict")
    given = _given({"verifier": verifier, "filter_params": filter_params, **companions})
    rows = _rows(prompts, "prompts")
    config = from_config_dict(config) if isinstance(config, ConfigDict) else config
    validate(config)
    wanted = companions_of(config)
    for companion in wanted:
        if companion.name not in given and not companion.handed_over:
            given[companion.name] = companion.open(config, model.mesh)
    decoder = Decoder(model, config, **given)
    for companion in wanted:
        companion.check_tokens(decoder.companions[companion.name], model, model_tokens=None, tokens=None)
    _check_ids(rows, "prompts", vocab_size=model.config.vocab_size)
    for index, row in enumerate(rows):
        try:
            decoder.check(row)
        except UsageError as error:
            raise UsageError(f"prompts[{index}]: {error}") from None
    return decode_all(decoder, rows)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The networks given as arguments, by the names of their companions; None is none."""
    by_argument = {companion.argument: companion for companion in every_companion().values()}
    given = {}
    for argument, value in arguments.items():
        if argument not in by_argument:
            raise TypeError(f"decode() got an unexpected keyword argument {argument!r}")
        if value is not None:
            companion = by_argument[argument]
            _check_type(value, argument, companion.kind, companion.told)
            given[companion.name] = companion.accept(value)
    return given


def _check_type(value: Any, name: str, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{name}: expected {expected}, got {_shown(value)}")


def _rows(value: Any, name: str) -> list[list[int]]:
    """Rows of token ids, from sequences of integers or an integer array with two axes.

    Raises:
        UsageError: it is anything else, or empty.
    """
    rows = [_row(row, f"{name}[{index}]") for index, row in enumerate(_items(value, name, "rows of token ids"))]
    if not rows:
        raise UsageError(f"{name}: expected at least one row of token ids, got none")
    return rows


def _row(value: Any, name: str) -> list[int]:
    row = []
    for index, token in enumerate(_items(value, name, "token ids")):
        try:
            if isinstance(token, bool | np.bool_):
                raise TypeError
            row.append(operator.index(token))
        except TypeError:
            raise UsageError(f"{name}[{index}]: expected an integer, got {_shown(token)}") from None
    if not row:
        raise UsageError(f"{name}: expected at least one token id, got none")
    return row


def _items(value: Any, name: str, expected: str) -> Sequence[Any]:
    """The items of a sequence, or of an array's first axis as Python values."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return np.asarray(value).tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise UsageError(f"{name}: expected {expected}, got {_shown(value)}")
    return value


def _check_ids(rows: Sequence[Sequence[int]], name: str, *, vocab_size: int) -> None:
    """Refuses ids outside the vocabulary."""
    for index, row in enumerate(rows):
        for place, token in enumerate(row):
            if not 0 <= token < vocab_size:
                raise UsageError(f"{name}[{index}][{place}]: expected an id from 0 to {vocab_size - 1}, got {token}")


def _valid(value: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "B L"]:
    """The mask, if it consists of booleans, or of zeros and ones as a tokenizer's attention_mask does."""
    try:
        valid = np.asarray(value)
    except ValueError:  # ragged
        raise UsageError(f"valid_BL: expected the shape of tokens_BL {shape}, got {_shown(value)}") from None
    if valid.shape != shape:
        raise UsageError(f"valid_BL: expected the shape of tokens_BL {shape}, got {valid.shape}")
    if valid.dtype.kind not in "biu" or not np.isin(valid, (0, 1)).all():
        raise UsageError(f"valid_BL: expected booleans, got {_shown(value)}")
    return valid.astype(bool)


def _shown(value: Any) -> str:
    """A value in an error message, with its type."""
    shown = reprlib.repr(value)
    return f"{' '.join(shown.split())} ({type(value).__name__})"
