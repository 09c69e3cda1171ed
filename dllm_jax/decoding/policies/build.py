"""From settings to a policy."""

import jax.numpy as jnp

from dllm_jax.checkpoints.filters import Filter
from dllm_jax.config import Config, block_schedule
from dllm_jax.decoding.policies import apd, dico
from dllm_jax.decoding.policies.base import CommitPolicy
from dllm_jax.decoding.policies.confidence import Scheduled
from dllm_jax.decoding.policies.dream import SCORES, DreamOrder, shares
from dllm_jax.decoding.policies.learn2pd import Learn2pd
from dllm_jax.decoding.policies.threshold import Factor, Threshold
from dllm_jax.decoding.prediction import Sampler
from dllm_jax.models.model import Model


def build_policy(
    config: Config,
    *,
    sampler: Sampler,
    verifier: Model | None,
    filter_: Filter | None,
    end_ids: tuple[int, ...],
    mask_id: int,
) -> CommitPolicy:
    """The policy that `decode.policy` names.

    Args:
        config: all settings.
        sampler: how tokens are drawn.
        verifier: the causal model of `apd`.
        filter_: the filter of `learn2pd`.
        end_ids: the tokens that end a text.
        mask_id: the token of a masked position.

    Raises:
        ValueError: an unknown name, or no filter (both are refused earlier).
    """
    decode = config.decode
    block_length, steps = block_schedule(decode)
    steps_per_block = jnp.int32(steps // (decode.gen_length // block_length))
    match decode.policy:
        case "low_confidence" | "random":
            return Scheduled(steps_per_block=steps_per_block, shuffled=decode.policy == "random")
        case "threshold":
            return Threshold(value=jnp.float32(config.threshold.value))
        case "factor":
            return Factor(value=jnp.float32(config.factor.value))
        case "entropy" | "maskgit_plus" | "topk_margin":
            return DreamOrder(share_S=jnp.asarray(shares(steps, eps=decode.eps)), score=SCORES[decode.policy])
        case "apd":
            return apd.build(config.apd, sampler=sampler, verifier=verifier, end_ids=end_ids)
        case "learn2pd" if filter_:
            threshold = jnp.float32(config.learn2pd.threshold)
            return Learn2pd(filter_.params, threshold, steps_per_block, filter_.graphdef)
        case "dico":
            return dico.build(
                config.dico, block_length=block_length, gen_length=decode.gen_length, mask_id=mask_id,
                traced=config.output.trace,
            )  # fmt: skip
    raise ValueError(f"no policy {decode.policy!r}")
