"""The Python API: load a model, look at its logits, decode prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dllm_jax.checkpoints import filters
from dllm_jax.checkpoints.load import load_model
from dllm_jax.config import Config, from_config_dict
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.decoding.vocabulary import check_shared
from dllm_jax.errors import UsageError
from dllm_jax.models.cache import causal_mask
from dllm_jax.models.model import Model

__all__ = ["decode", "load_model", "logits"]


def logits(
    model: Model, tokens_BL: Int[np.ndarray, "B L"], valid_BL: Bool[np.ndarray, "B L"] | None = None
) -> Float[np.ndarray, "B L V"]:
    """Raw logits of a forward pass, float32: unshifted, causal for autoregressive models.

    Args:
        model: from `load_model`.
        tokens_BL: token ids.
        valid_BL: False for padding, which no token attends to; positions count the valid tokens. Default: all valid.
    """
    tokens = jnp.asarray(tokens_BL, jnp.int32)
    valid = jnp.ones(tokens.shape, bool) if valid_BL is None else jnp.asarray(valid_BL, bool)
    if valid.shape != tokens.shape:
        raise UsageError(f"valid_BL: expected the shape of tokens_BL {tokens.shape}, got {valid.shape}")
    return np.asarray(_logits(model.graphdef, model.params, tokens, valid))


@jax.jit
def _logits(
    graphdef: nnx.GraphDef, params: nnx.State, tokens_BL: Int[Array, "B L"], valid_BL: Bool[Array, "B L"]
) -> Float[Array, "B L V"]:
    module = nnx.merge(graphdef, params)
    positions_BL = jnp.cumsum(valid_BL, axis=1) - 1
    mask = valid_BL[:, None, None, :]
    if module.config.causal:
        length = tokens_BL.shape[1]
        mask = mask & causal_mask(jnp.arange(length)[None], keys=length)
    hidden_BLD, _ = module(tokens_BL, positions_BL, mask=mask)
    return module.unembed(hidden_BLD).astype(jnp.float32)


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: Config | ConfigDict,
    verifier: Model | None = None,
    filter_params: Mapping[str, Any] | None = None,
) -> DecodeResult:
    """Decodes prompts of any number and length.

    Args:
        model: a diffusion model from `load_model`.
        prompts: token ids of every prompt.
        config: settings, of which `decode` and what belongs to the policy are used.
        verifier: a causal model over the same tokens from `load_model`, for the policy `apd`.
        filter_params: the arrays of a filter, linear1.weight [width, block_length], linear1.bias [width] and so on, for
            the policy `learn2pd`; default: those in `filter.path`.

    Returns:
        Tokens and counts per prompt, in the order given.

    Raises:
        UsageError: a wrong setting or prompt; the prompt's index is named.
    """
    config = from_config_dict(config) if isinstance(config, ConfigDict) else config
    filter_ = filters.open_filter(config) if filter_params is None else filters.from_arrays(filter_params)
    decoder = Decoder(model, config, verifier=verifier, filter_=filter_)
    if decoder.verifier:
        check_shared(model, decoder.verifier, model_tokens=None, verifier_tokens=None)
    if not len(prompts):
        raise UsageError("prompts: expected at least one, got none")
    for index, prompt in enumerate(prompts):
        try:
            decoder.check(prompt)
        except UsageError as error:
            raise UsageError(f"prompts[{index}]: {error}") from None
    return decode_all(decoder, prompts)
