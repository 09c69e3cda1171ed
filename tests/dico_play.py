"""Plays given predictions to the DiCo policy, without a model and without the driver."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Sizes
from dllm_jax.decoding.policies.dico import Dico
from dllm_jax.decoding.sampling import KeyedNoise
from dllm_jax.decoding.state import DecodeState
from tests.views import a_prediction, a_view

MASK = -1


@partial(jax.jit, static_argnames="block_length")
def run(
    policy: Dico, tokens_G: jax.Array, predictions: tuple[jax.Array, jax.Array, jax.Array], *, block_length: int
) -> dict[str, Any]:
    """A row's blocks one after the other, until they are done or the predictions are."""
    forwards, length = predictions[0].shape
    geometry = Geometry(prompt_length=0, gen_length=length, block_length=block_length)
    zero_B = jnp.zeros(1, jnp.int32)
    state = DecodeState.start(tokens_G[None], pad_B=zero_B, row_B=zero_B, live_B=zero_B == 0, geometry=geometry)

    def step(carry: dict[str, Any]) -> dict[str, Any]:
        start = carry["block"] * block_length
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block_length, axis=-1)
        token_BQ, confidence_BQ, margin_BQ = (cut(all_FG[carry["nfe"]])[None] for all_FG in predictions)
        open_BQ = cut(carry["tokens_G"])[None] == MASK
        view = a_view(
            open_BQ,
            start_B=start[None],
            position_BQ=start + jnp.arange(block_length)[None],
            end_B=zero_B + length,
            filled_B=jnp.sum(carry["tokens_G"] != MASK)[None],
            nfe_B=carry["nfe"][None],
            block_nfe_B=carry["block_nfe"][None],
        )
        prediction = a_prediction(confidence_BQ, token_BQ=token_BQ, margin_BQ=margin_BQ)
        commit = policy.commit(carry["policy_state"], prediction, view, KeyedNoise(jax.random.key(0)))
        mask_Q, leave = (commit.mask_BQ & view.open_BQ)[0], commit.leave_B[0]
        nfe = carry["nfe"] + 1

        def written(old_G: jax.Array, new_Q: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old_G, jnp.where(mask_Q, new_Q, cut(old_G)), start, axis=0)

        return {
            "tokens_G": written(carry["tokens_G"], commit.token_BQ[0]),
            "commit_step_G": written(carry["commit_step_G"], nfe),
            "policy_state": commit.policy_state,
            "nfe": nfe,
            "block": carry["block"] + leave,
            "block_nfe": jnp.where(leave, 0, carry["block_nfe"] + 1),
        }

    start = {
        "tokens_G": tokens_G,
        "commit_step_G": jnp.zeros_like(tokens_G),
        "policy_state": policy.init(state, geometry, Sizes(block_length, vocab=0)),
        "nfe": jnp.int32(0),
        "block": jnp.int32(0),
        "block_nfe": jnp.int32(0),
    }
    return jax.lax.while_loop(
        lambda carry: (carry["block"] < geometry.num_blocks) & (carry["nfe"] < forwards), step, start
    )


def play(
    policy: Dico,
    confidence_FG: np.ndarray,
    margin_FG: np.ndarray,
    *,
    block_length: int,
    token_FG: np.ndarray | None = None,
    is_open_G: np.ndarray | None = None,
) -> dict[str, Any]:
    """What the policy does with the predictions of forward i in the i-th rows; see `run`."""
    forwards, length = confidence_FG.shape
    token_FG = np.zeros(confidence_FG.shape, np.int32) if token_FG is None else token_FG.astype(np.int32)
    is_open_G = np.ones(length, bool) if is_open_G is None else is_open_G
    tokens_G = jnp.where(jnp.asarray(is_open_G), MASK, 0).astype(jnp.int32)
    predictions = tuple(map(jnp.asarray, (token_FG, confidence_FG, margin_FG)))
    policy = policy.replace(mask_id=MASK, traced_forwards=forwards)
    final = run(policy, tokens_G, predictions, block_length=block_length)
    return jax.tree.map(np.asarray, final) | final["policy_state"].log.value.row(0)
