"""From the logits of the prediction slots to a token, its confidence and its margin.

The token is drawn with Gumbel noise scaled by the temperature, which is a draw from softmax(logits / temperature). The
confidence is its probability: in the softmax of the bare logits by LLaDA's rule (arXiv 2502.09992, section 2.4, and its
released sampler), in the very distribution it was drawn from, temperature and top-p included, by Dream's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.sampling import nucleus
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.settings import DREAM_ORDERS, DecodeSettings


@struct.dataclass
class Prediction:
    """What the model says about every slot. What a policy does not read is never computed."""

    token_BQ: Int[Array, "B Q"]  # the proposal
    confidence_BQ: Float[Array, "B Q"]  # its probability, in [0, 1]
    margin_BQ: Float[Array, "B Q"]  # logit of the best token minus the largest other; below 0 where [MASK] is surer
    entropy_BQ: Float[Array, "B Q"]  # of the distribution that the confidence comes from, in nats
    finite_BQ: Bool[Array, "B Q"]  # the model's numbers are numbers: else nothing here means anything
    logits_BQV: Float[Array, "B Q V"]  # whose softmax the confidence comes from; V = 0 for slots of several blocks
    gumbel_BQV: Float[Array, "B Q V"] | None = None  # the draw behind the tokens; None at temperature 0
    mask_id: int | None = struct.field(pytree_node=False, default=None)  # of the sampler


@struct.dataclass
class Sampler:
    """How tokens are drawn. Numbers are traced, what changes the program is static."""

    temperature: Float[Array, ""]
    noise_scale: Float[Array, ""]  # of the Gumbel noise, on logits that are not divided by the temperature
    top_p: Float[Array, ""]
    cfg_scale: Float[Array, ""]
    stochastic: bool = struct.field(pytree_node=False)  # temperature > 0
    cut: bool = struct.field(pytree_node=False)  # top_p < 1
    top_k: int = struct.field(pytree_node=False)  # tokens that may be drawn; 0: all
    tempered: bool = struct.field(pytree_node=False)  # the confidence is Dream's, else LLaDA's
    guided: bool = struct.field(pytree_node=False)  # cfg_scale > 0: the batch holds a second, promptless half
    order_by_drawn: bool = struct.field(pytree_node=False)  # else by the most likely token
    mask_id: int | None = struct.field(pytree_node=False)  # never proposed; None: a token as any other
    never_ids: tuple[int, ...] = struct.field(pytree_node=False)  # cannot be predicted
    last_ids: tuple[int, ...] = struct.field(pytree_node=False)  # can be predicted, at confidence 0

    @classmethod
    def from_settings(cls, decode: DecodeSettings, model: TransformerConfig, *, end_ids: tuple[int, ...]) -> "Sampler":
        """The sampler of a configuration; `end_ids` are the tokens that end a text."""
        last_ids: tuple[int, ...] = ()
        if decode.confidence_eos_eot_inf:
            last_ids = end_ids
            if decode.compat == "reference" and decode.temperature > 0:
                # The released code writes EoS into the noisy copy of the logits, which the confidence does not read.
                last_ids = tuple(i for i in last_ids if i != model.eos_id)
        return cls(
            temperature=jnp.float32(decode.temperature),
            noise_scale=jnp.float32(decode.temperature),
            top_p=jnp.float32(decode.top_p),
            cfg_scale=jnp.float32(decode.cfg_scale),
            stochastic=decode.temperature > 0,
            cut=decode.top_p < 1,
            top_k=min(decode.top_k, model.vocab_size),
            tempered=decode.policy in DREAM_ORDERS or model.block_causal,
            guided=decode.cfg_scale > 0,
            order_by_drawn=decode.temperature_affects_order,
            mask_id=None if decode.compat == "reference" else model.mask_id,
            never_ids=(model.eos_id,) if decode.logits_eos_inf else (),
            last_ids=last_ids,
        )

    def with_tempered_noise(self) -> "Sampler":
        """Multiplies the noise by the temperature once more: a draw at its square, as APD was released."""
        return dataclasses.replace(self, noise_scale=self.temperature**2)

    def greedy(self) -> "Sampler":
        """Takes the most likely token."""
        return dataclasses.replace(self, stochastic=False, cut=False)


def guide(logits: Float[Array, "two_B Q V"], cfg_scale: Float[Array, ""]) -> Float[Array, "B Q V"]:
    """Classifier-free guidance: u + (s + 1)(l - u) for the rows of `paired` arrays, with their prompt and without."""
    conditional, unconditional = jnp.moveaxis(logits.reshape(-1, 2, *logits.shape[1:]), 1, 0)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def paired(x: Array, other: Array) -> Array:
    """The rows 2b of one array and 2b + 1 of another: a pair is on one device, however the batch is sharded."""
    return jnp.stack([x, other], axis=1).reshape(-1, *x.shape[1:])


def _without(logits_BQV: Float[Array, "B Q V"], ids: tuple[int, ...]) -> Float[Array, "B Q V"]:
    """The logits with some tokens ruled out."""
    token_11V = jnp.arange(logits_BQV.shape[-1])[None, None]
    for token in ids:
        logits_BQV = jnp.where(token_11V == token, -jnp.inf, logits_BQV)
    return logits_BQV


def proposable(logits_BQV: Float[Array, "B Q V"], mask_id: int | None) -> Float[Array, "B Q V"]:
    """The logits of what may be proposed: [MASK] is no answer, however sure the model is of it."""
    return logits_BQV if mask_id is None else _without(logits_BQV, (mask_id,))


def drawn_from(logits_BQV: Float[Array, "B Q V"], sampler: Sampler) -> Float[Array, "B Q V"]:
    """The logits that a token is drawn from: -inf but for the top k, and of those outside the nucleus.

    The nucleus is that of softmax(logits / temperature). One of [MASK] alone also holds the best token.
    """
    if sampler.top_k:
        least_BQ = jax.lax.top_k(logits_BQV, sampler.top_k)[0][..., -1]
        logits_BQV = jnp.where(logits_BQV >= least_BQ[..., None], logits_BQV, -jnp.inf)
    if not sampler.cut:
        return logits_BQV
    temperature = sampler.temperature if sampler.stochastic else 1.0
    allowed_BQV = proposable(logits_BQV, sampler.mask_id)
    is_best_BQV = allowed_BQV == jnp.max(allowed_BQV, axis=-1, keepdims=True)
    return jnp.where(nucleus(logits_BQV / temperature, sampler.top_p) | is_best_BQV, logits_BQV, -jnp.inf)


def draw(
    drawn_BQV: Float[Array, "B Q V"], sampler: Sampler, *, gumbel_BQV: Float[Array, "B Q V"] | None
) -> Int[Array, "B Q"]:
    """A token for every slot: argmax(logits + scale * g), from softmax(logits / scale); without noise the likeliest.

    It is never [MASK].
    """
    drawn_BQV = proposable(drawn_BQV, sampler.mask_id)
    if sampler.stochastic and gumbel_BQV is not None:
        drawn_BQV = drawn_BQV + sampler.noise_scale * gumbel_BQV
    return jnp.argmax(drawn_BQV, axis=-1).astype(jnp.int32)


def predict(
    logits_BQV: Float[Array, "B Q V"], sampler: Sampler, *, gumbel_BQV: Float[Array, "B Q V"] | None
) -> Prediction:
    """Draws a token for every slot and says how sure the model is.

    Args:
        logits_BQV: float32 logits (after guidance).
        sampler: how to draw.
        gumbel_BQV: standard Gumbel noise, None at temperature 0.
    """
    logits_BQV = _without(logits_BQV, sampler.never_ids)
    temperature = sampler.temperature if sampler.stochastic else 1.0
    drawn_BQV = drawn_from(logits_BQV, sampler)
    token_BQ = draw(drawn_BQV, sampler, gumbel_BQV=gumbel_BQV)
    ranked_BQV = _without(drawn_BQV / temperature if sampler.tempered else logits_BQV, sampler.last_ids)
    # The maximum is subtracted before the exponential, so that ties of saturated probabilities stay exact ties.
    top_BQ = jnp.max(ranked_BQV, axis=-1)
    below_BQV = ranked_BQV - top_BQ[..., None]
    total_BQ = jnp.sum(jnp.exp(below_BQV), axis=-1)
    weighted_BQ = jnp.sum(jnp.where(below_BQV > -jnp.inf, jnp.exp(below_BQV) * below_BQV, 0), axis=-1)
    if sampler.order_by_drawn:
        chosen_BQ = jnp.take_along_axis(ranked_BQV, token_BQ[..., None], axis=-1)[..., 0]
    else:
        chosen_BQ = jnp.max(proposable(ranked_BQV, sampler.mask_id), axis=-1)
    confidence_BQ = jnp.exp(chosen_BQ - top_BQ) / total_BQ
    allowed_BQV = proposable(logits_BQV, sampler.mask_id)
    best_BQ = jnp.argmax(allowed_BQV, axis=-1)
    best_logit_BQ = jnp.max(allowed_BQV, axis=-1)
    others_BQV = jnp.where(jnp.arange(logits_BQV.shape[-1])[None, None] == best_BQ[..., None], -jnp.inf, logits_BQV)
    # A maximum is NaN where one of its terms is: so it tells of a NaN anywhere, of +inf, and of -inf everywhere.
    is_finite_BQ = jnp.isfinite(jnp.max(logits_BQV, axis=-1)) & jnp.isfinite(best_logit_BQ)
    return Prediction(
        token_BQ=token_BQ,
        confidence_BQ=confidence_BQ,
        margin_BQ=best_logit_BQ - jnp.max(others_BQV, axis=-1),
        entropy_BQ=jnp.log(total_BQ) - weighted_BQ / total_BQ,
        finite_BQ=is_finite_BQ & jnp.isfinite(confidence_BQ),
        logits_BQV=ranked_BQV,
        gumbel_BQV=gumbel_BQV,
        mask_id=sampler.mask_id,
    )


def predict_slots(logits: Float[Array, "rows Q V"], sampler: Sampler, *, noise: jax.Array | None) -> Prediction:
    """`predict` on the raw output of a forward, guidance included."""
    return predict(guide(logits, sampler.cfg_scale) if sampler.guided else logits, sampler, gumbel_BQV=noise)
