"""Adaptive parallel decoding (APD, arXiv 2506.00413): from left to right, as many tokens as a small verifier agrees to.

The diffusion model drafts all masks of its window at once, each from its own marginal p_D. The verifier, a causal
language model over the same tokens, scores the draft in one forward. Where p_D and the verifier's p_AR, which knows the
tokens drafted before, point the same way, parallel drafting loses nothing.
"""

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.config import Config
from dllm_jax.decoding import canvas
from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies.base import Commit, InPlace, Parts, Policy, Sizes, View, Wants
from dllm_jax.decoding.policies.companions import LanguageModel
from dllm_jax.decoding.prediction import Prediction, Sampler, draw, drawn_from
from dllm_jax.decoding.sampling import Noise, is_any
from dllm_jax.decoding.state import DecodeState
from dllm_jax.errors import UsageError
from dllm_jax.models.cache import Cache, columns_of, widened
from dllm_jax.models.transformer import Transformer


@struct.dataclass
class Verified:
    """What the verifier knows of the tokens accepted so far, up to the cursor."""

    last_BD: Float[Array, "B D"]  # its hidden state at the last of them: what it says about the next
    cache: InPlace  # its keys and values by canvas column; those from the cursor on are stale and never seen


@struct.dataclass
class Apd(Policy):
    """Accepts the longest prefix of the draft that a draw from the mixture of both models repeats (algorithm 1).

    Attributes:
        graphdef: of the verifier.
        params: of the verifier.
        mixture_weight: R in the target p_T ~ p_D^R * p_AR^(1 - R): at 1 the draft is its own target.
        sampler: how the target is drawn; with the noise of the draft (as in the paper) or greedily (as released).
        end_ids: a row ends with the step that accepts one of these tokens.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    mixture_weight: Float[Array, ""]
    sampler: Sampler
    end_ids: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def wants(self) -> Wants:
        """The target is drawn from a mixture with them."""
        return Wants(logits=True)

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Verified:
        """Runs the verifier on the prompts."""
        prompts_BP = state.tokens_BL[:, : geometry.prompt_length]
        hidden_BPD, cache = self._read(prompts_BP, jnp.int32(0), pad_B=state.pad_B, cache=None)
        return Verified(hidden_BPD[:, -1], InPlace(widened(cache, columns=geometry.columns)))

    def commit(self, policy_state: Verified, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """Accepts the first token, and those behind it as long as draft and target are the same."""
        target_BQ, is_finite_BQ, hidden_BQD, cache = self.verify(policy_state, prediction, view)
        agrees_BQ = (prediction.token_BQ == target_BQ).at[:, 0].set(True)
        commit = accept(jnp.cumprod(agrees_BQ, axis=1).sum(axis=1), prediction, view, end_ids=self.end_ids)
        last_B11 = (commit.mask_BQ.sum(axis=1) - 1)[:, None, None]
        last_BD = jnp.take_along_axis(hidden_BQD, last_B11, axis=1)[:, 0]
        failed_B = (view.open_BQ & ~is_finite_BQ).any(axis=1)
        return commit._replace(policy_state=Verified(last_BD, InPlace(cache)), failed_B=failed_B)

    def verify(
        self, policy_state: Verified, prediction: Prediction, view: View
    ) -> tuple[Int[Array, "B Q"], Bool[Array, "B Q"], Float[Array, "B Q D"], Cache]:
        """Runs the verifier on the draft and draws the target, where log p_T = R log p_D + (1 - R) log p_AR + constant.

        Args:
            policy_state: before the step.
            prediction: the draft, with its logits over a vocabulary that may be wider than the verifier's.
            view: the step.

        Returns:
            The target's tokens, where their logits are finite, the verifier's hidden states at the draft, and its cache
            with them.
        """
        hidden_BQD, cache = self._read(
            prediction.token_BQ, view.start_B, pad_B=view.pad_B, cache=policy_state.cache.value
        )
        # A token is scored by the hidden state before it.
        verifier_BQV = self.verifier.unembed(
            jnp.concatenate([policy_state.last_BD[:, None], hidden_BQD[:, :-1]], axis=1)
        )
        shared = min(prediction.logits_BQV.shape[-1], verifier_BQV.shape[-1])
        mixture_BQV = (
            self.mixture_weight * prediction.logits_BQV[..., :shared]
            + (1 - self.mixture_weight) * verifier_BQV[..., :shared]
        )
        gumbel_BQV = None if prediction.gumbel_BQV is None else prediction.gumbel_BQV[..., :shared]
        target_BQ = draw(drawn_from(mixture_BQV, self.sampler), self.sampler, gumbel_BQV=gumbel_BQV)
        return target_BQ, jnp.isfinite(jnp.max(mixture_BQV, axis=-1)), hidden_BQD, cache

    @property
    def verifier(self) -> Transformer:
        """The causal model; costs nothing inside a program."""
        return nnx.merge(self.graphdef, self.params)

    def _read(
        self,
        tokens_BT: Int[Array, "B T"],
        start: Int[Array, ""] | Int[Array, "B"],
        *,
        pad_B: Int[Array, "B"],
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The verifier on the columns from `start` on. None sees beyond itself, so stale columns are never seen."""
        columns = canvas.columns_from(start, width=tokens_BT.shape[1])
        keys = tokens_BT.shape[1] if cache is None else columns_of(cache)
        real_BS = canvas.between(pad_B, jnp.full_like(pad_B, keys), columns=keys)
        # Of a shorter vocabulary, the last token stands for those it lacks.
        known_BT = jnp.minimum(tokens_BT, self.verifier.config.vocab_size - 1)
        return self.verifier(known_BT, canvas.positions(columns, pad_B), real_BS=real_BS, cache=cache, start=start)


@struct.dataclass
class LeftToRight(Policy):
    """The baseline without a verifier: a fixed number of tokens per step from left to right."""

    tokens_per_step: Int[Array, ""]
    end_ids: tuple[int, ...] = struct.field(pytree_node=False)

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        """The first tokens of the draft, or all that are left."""
        count_B = jnp.full_like(view.start_B, self.tokens_per_step)
        return accept(count_B, prediction, view, end_ids=self.end_ids)


class Verifier(LanguageModel):
    """The causal model; the baseline goes without."""

    name = argument = "verifier"
    expected = "a causal model for decode.policy apd (or apd.tokens_per_step)"
    advice = "train/verifier.py trains one over the tokens of a model"

    def wanted(self, config: Config) -> bool:
        """Unless `apd.tokens_per_step` asks for the baseline."""
        return not config.apd.tokens_per_step

    def superfluous(self, config: Config) -> None:
        """The baseline has no use for it."""
        raise UsageError("apd.tokens_per_step: expected 0 together with a verifier, got both")


def build(config: Config, parts: Parts) -> Apd | LeftToRight:
    """The policy of the settings: APD with a verifier, without one its baseline."""
    apd, sampler = config.apd, parts.sampler
    if Verifier.name not in parts.companions:
        return LeftToRight(jnp.int32(apd.tokens_per_step), parts.end_ids)
    verifier = parts.companions[Verifier.name]
    return Apd(
        graphdef=verifier.graphdef,
        params=verifier.params,
        mixture_weight=jnp.float32(apd.mixture_weight),
        sampler=sampler.greedy() if apd.target == "argmax" else sampler,
        end_ids=parts.end_ids,
    )


def tempered(config: Config, sampler: Sampler) -> Sampler:
    """How the draft is drawn: as released, or by temperature alone."""
    return sampler.with_tempered_noise() if config.apd.temper_noise else sampler


def accept(count_B: Int[Array, "B"], prediction: Prediction, view: View, *, end_ids: tuple[int, ...]) -> Commit:
    """Commits the first `count_B` drafted tokens inside the canvas; rows end behind the last end of text there."""
    mask_BQ: Bool[Array, "B Q"] = view.open_BQ & (jnp.arange(view.open_BQ.shape[1])[None, :] < count_B[:, None])
    behind_B = view.start_B + mask_BQ.sum(axis=1)
    stops_B = (mask_BQ & is_any(prediction.token_BQ, end_ids)).any(axis=1)
    end_B = jnp.where(stops_B, behind_B, view.end_B)
    return Commit(mask_BQ, prediction.token_BQ, leave_B=behind_B >= end_B, policy_state=(), end_B=end_B)
