"""Random weights that end their texts: what a stop rule saves can be timed without a trained model."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model, computing


def with_eos_logit(model: Model, logit: float, *, gen_length: int) -> Model:
    """A diffusion model that predicts EoS with about the given logit wherever there is a mask.

    The head's column for EoS becomes the mean hidden state of an empty canvas, scaled: with random weights masked
    positions hardly differ from each other.

    Args:
        model: with random weights and a head of its own.
        logit: the others are spread around 0.
        gen_length: masks in that canvas.

    Raises:
        UsageError: the model predicts no masks.
    """
    mask_id, eos_id = model.config.mask_id, model.config.eos_id
    if mask_id is None:
        raise UsageError(f"model.preset: expected a masked diffusion model, got the {model.config.family} model")

    @jax.jit
    def changed(params: nnx.State) -> nnx.State:
        module = nnx.merge(model.graphdef, params)
        tokens_1T = jnp.full((1, gen_length), mask_id)
        hidden_1TD, _ = module(tokens_1T, jnp.arange(gen_length)[None], real_BS=jnp.ones((1, gen_length), bool))
        mean_D = jnp.mean(hidden_1TD[0].astype(jnp.float32), axis=0)
        column_D = logit * mean_D / jnp.sum(mean_D**2)
        module.head[...] = module.head[...].at[:, eos_id].set(column_D.astype(model.dtype))
        return nnx.state(module)

    with computing(model.mesh):
        return dataclasses.replace(model, params=changed(model.params))
