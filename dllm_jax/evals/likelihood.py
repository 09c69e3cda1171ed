"""Monte-Carlo log-likelihood of an answer under LLaDA (arXiv 2502.09992, section 2.4; its `get_log_likelihood.py`).

A diffusion model bounds log p(answer | prompt) from below: mask l of the A answer tokens, sum the log-probabilities of
the masked ones, weight the sum by A / l, and average over l and the choice of positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.prediction import guide, paired
from dllm_jax.errors import UsageError
from dllm_jax.mesh import batch_multiple, batch_shardings
from dllm_jax.models.layers import wide
from dllm_jax.models.model import Model, computing

LENGTH_MULTIPLE = 64  # canvases are padded to it, so that answers of many lengths share a compiled program


def perturb(
    rng: np.random.Generator, prompt: Sequence[int], *, answer: Sequence[int], batch_size: int, mask_id: int
) -> tuple[Int[np.ndarray, "B L"], Float[np.ndarray, "B"]]:
    """Draws a batch of prompt ++ answer with masked answer tokens.

    The mask counts are a stratified ramp: the first is uniform in 1..A, the others follow at steps of A / batch_size
    and wrap around, so that every batch covers small and large counts evenly.

    Args:
        rng: source of the draws.
        prompt: token ids; never masked.
        answer: A token ids, A >= 1.
        batch_size: B.
        mask_id: the mask token.

    Returns:
        The canvases (int32) and the masked share of each answer (float32, in (0, 1]).
    """
    length = len(answer)
    ramp_B = np.round(rng.integers(1, length + 1) + np.arange(batch_size) * (length / batch_size)).astype(np.int64)
    counts_B = (ramp_B - 1) % length + 1
    masked_BA = rng.permuted(np.arange(length)[None, :] < counts_B[:, None], axis=1)
    answers_BA = np.where(masked_BA, mask_id, np.asarray(answer))
    prompts_BP = np.broadcast_to(np.asarray(prompt, dtype=np.int64), (batch_size, len(prompt)))
    return np.concatenate([prompts_BP, answers_BA], axis=1, dtype=np.int32), (counts_B / length).astype(np.float32)


def per_sample_loss(
    model: Model,
    perturbed_BL: Int[np.ndarray, "B L"],
    *,
    p_mask_B: Float[np.ndarray, "B"],
    target_L: Int[np.ndarray, "L"],
    prompt_length: int,
    cfg_scale: float,
) -> Float[Array, "B"]:
    """Cross-entropy of the masked answer tokens, summed over each row and divided by its masked share.

    Args:
        model: a LLaDA model.
        perturbed_BL: canvases from `perturb`.
        p_mask_B: the masked share of each row's answer.
        target_L: prompt ++ answer without masks.
        prompt_length: where the answer starts.
        cfg_scale: classifier-free guidance; above 0 every row also runs with its prompt masked.

    Raises:
        UsageError: the model is of another family.
    """
    batch_size, length = perturbed_BL.shape
    padding = -length % LENGTH_MULTIPLE
    batch: Any = (np.pad(perturbed_BL, ((0, 0), (0, padding))), p_mask_B)
    if batch_size % batch_multiple(model.mesh) == 0:
        batch = jax.device_put(batch, batch_shardings(batch, model.mesh))
    with computing(model.mesh):
        return _losses(
            model.graphdef,
            model.params,
            *batch,
            np.pad(target_L, (0, padding)),
            _mask_id(model),
            prompt_length,
            length,
            cfg_scale,
            guided=cfg_scale > 0,
        )


def _mask_id(model: Model) -> int:
    """The mask token, of the one family whose likelihood is defined here (others shift their logits or are causal)."""
    if model.config.family != "llada" or model.config.mask_id is None:
        raise UsageError(f"model.path: expected a LLaDA model for likelihoods, got a {model.config.family} model")
    return model.config.mask_id


@jax.jit(static_argnames=("guided",))
def _losses(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_BL: Int[Array, "B L"],
    p_mask_B: Float[Array, "B"],
    target_L: Int[Array, "L"],
    mask_id: Int[Array, ""],
    prompt_length: Int[Array, ""],
    length: Int[Array, ""],
    cfg_scale: Float[Array, ""],
    *,
    guided: bool,
) -> Float[Array, "B"]:
    """`per_sample_loss` on padded canvases; logits exist for LENGTH_MULTIPLE columns at a time."""
    module = nnx.merge(graphdef, params)
    column_L = jnp.arange(tokens_BL.shape[1])
    in_prompt_L, real_L = column_L < prompt_length, column_L < length
    masked_BL = (tokens_BL == mask_id) & (real_L & ~in_prompt_L)[None, :]
    canvases_NL = tokens_BL
    if guided:
        canvases_NL = paired(tokens_BL, jnp.where(in_prompt_L[None, :], mask_id, tokens_BL))
    positions_NL = jnp.broadcast_to(column_L[None, :], canvases_NL.shape)
    hidden_NLD, _ = module(canvases_NL, positions_NL, real_BS=jnp.broadcast_to(real_L[None, :], canvases_NL.shape))

    def add_columns(total_B: Float[Array, "B"], start: Int[Array, ""]) -> tuple[Float[Array, "B"], None]:
        hidden_NCD, masked_BC, target_C = (
            jax.lax.dynamic_slice_in_dim(x, start, LENGTH_MULTIPLE, axis)
            for x, axis in ((hidden_NLD, 1), (masked_BL, 1), (target_L, 0))
        )
        logits_BCV = guide(module.unembed(hidden_NCD), cfg_scale) if guided else module.unembed(hidden_NCD)
        return total_B + _masked_cross_entropy(logits_BCV, target_C, masked_BC), None

    starts = jnp.arange(0, len(column_L), LENGTH_MULTIPLE)
    total_B, _ = jax.lax.scan(add_columns, jnp.zeros_like(wide(hidden_NLD[: len(p_mask_B), 0, 0])), starts)
    return total_B / p_mask_B


def _masked_cross_entropy(
    logits_BCV: Float[Array, "B C V"], target_C: Int[Array, "C"], masked_BC: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    target_BC = jnp.broadcast_to(target_C[None, :], masked_BC.shape)
    loss_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, target_BC)
    return jnp.sum(loss_BC, axis=1, where=masked_BC)


def log_likelihood(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    mc_num: int,
    batch_size: int,
    cfg_scale: float,
    seed: int,
) -> float:
    """Estimates log p(answer | prompt) in nats.

    Args:
        model: a LLaDA model.
        prompt: token ids; may be empty.
        answer: token ids, at least one.
        mc_num: draws to average (the authors use 128), a multiple of batch_size.
        batch_size: draws per forward.
        cfg_scale: classifier-free guidance, 0 for none.
        seed: of the draws.

    Raises:
        UsageError: not a LLaDA model, an empty answer, too many tokens, or an mc_num that batch_size does not divide.
    """
    mask_id, total, longest = _mask_id(model), len(prompt) + len(answer), model.config.max_length
    if not answer:
        raise UsageError("answer: expected at least one token, got none")
    if total > longest:
        raise UsageError(f"prompt + answer: expected at most {longest} tokens, got {total}")
    if mc_num < 1 or mc_num % batch_size:
        raise UsageError(f"mc_num: expected a multiple of batch_size {batch_size}, got {mc_num}")
    rng, target_L = np.random.default_rng(seed), np.asarray([*prompt, *answer], dtype=np.int32)
    losses = []
    for _ in range(mc_num // batch_size):
        perturbed_BL, p_mask_B = perturb(rng, prompt, answer=answer, batch_size=batch_size, mask_id=mask_id)
        losses.append(
            per_sample_loss(
                model,
                perturbed_BL,
                p_mask_B=p_mask_B,
                target_L=target_L,
                prompt_length=len(prompt),
                cfg_scale=cfg_scale,
            )
        )
    return -float(np.mean(jax.device_get(losses)))
