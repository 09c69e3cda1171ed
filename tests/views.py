"""Predictions and views for policies that run without a model and without the driver."""

from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.decoding.policies.base import View
from dllm_jax.decoding.prediction import Prediction


def a_view(open_BQ: jax.Array, **given: Any) -> View:
    """The view of a step at the beginning of a block, which its slots are; what is given replaces what it holds."""
    batch, slots = open_BQ.shape
    zero_B = jnp.zeros(batch, jnp.int32)
    position_BQ = jnp.tile(jnp.arange(slots), (batch, 1))
    values = {
        "start_B": zero_B,
        "position_BQ": position_BQ,
        "open_BQ": open_BQ,
        "block_BQ": jnp.ones_like(open_BQ),
        "token_BQ": jnp.zeros_like(position_BQ),
        "pad_B": zero_B,
        "end_B": zero_B + slots,
        "filled_B": zero_B,
        "row_B": zero_B,
        "nfe_B": zero_B,
        "block_nfe_B": zero_B,
        "closing_B": zero_B > 0,
    }
    return View(**values | given)


def a_prediction(confidence_BQ: jax.Array, **given: Any) -> Prediction:
    """A prediction of token 0 everywhere, with these confidences; what is given replaces what it holds."""
    token_BQ = jnp.zeros(confidence_BQ.shape, jnp.int32)
    values = {
        "token_BQ": token_BQ,
        "confidence_BQ": confidence_BQ,
        "margin_BQ": confidence_BQ,
        "entropy_BQ": confidence_BQ,
        "finite_BQ": token_BQ == 0,
        "logits_BQV": confidence_BQ[..., None],
    }
    return Prediction(**values | given)
