"""From settings to a policy."""

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp

from dllm_jax.checkpoints.filters import Filter
from dllm_jax.config import Config
from dllm_jax.decoding.policies import apd, dico
from dllm_jax.decoding.policies.base import Policy
from dllm_jax.decoding.policies.clad import Clad
from dllm_jax.decoding.policies.confidence import Scheduled
from dllm_jax.decoding.policies.credit import Credit
from dllm_jax.decoding.policies.dawn import Dawn
from dllm_jax.decoding.policies.dream import SCORES, DreamOrder, shares
from dllm_jax.decoding.policies.entropy import EntropyBound, EntropyThreshold
from dllm_jax.decoding.policies.frechet import Frechet
from dllm_jax.decoding.policies.hierarchy import Hierarchy
from dllm_jax.decoding.policies.klass import Klass
from dllm_jax.decoding.policies.learn2pd import Learn2pd
from dllm_jax.decoding.policies.local_leap import LocalLeap
from dllm_jax.decoding.policies.r2 import R2
from dllm_jax.decoding.policies.threshold import Factor, Threshold
from dllm_jax.decoding.policies.wino import Wino
from dllm_jax.decoding.prediction import Sampler
from dllm_jax.models.model import Model
from dllm_jax.settings import block_schedule

P = TypeVar("P", bound=Policy)


def build_policy(
    config: Config,
    *,
    sampler: Sampler,
    verifier: Model | None,
    filter_: Filter | None,
    end_ids: tuple[int, ...],
    mask_id: int,
) -> Policy:
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
            return of_numbers(Threshold, config.threshold)
        case "factor":
            return of_numbers(Factor, config.factor)
        case "frechet":
            return of_numbers(Frechet, config.frechet)
        case "klass":
            return of_numbers(Klass, config.klass)
        case "local_leap":
            return of_numbers(LocalLeap, config.local_leap)
        case "dawn":
            return of_numbers(Dawn, config.dawn)
        case "clad":
            return of_numbers(Clad, config.clad)
        case "wino":
            return of_numbers(Wino, config.wino)
        case "r2":
            return of_numbers(R2, config.r2)
        case "hierarchy":
            return of_numbers(Hierarchy, config.hierarchy)
        case "credit":
            return of_numbers(Credit, config.credit, sampler=sampler)
        case "eb":
            return of_numbers(EntropyBound, config.eb)
        case "entropy_threshold":
            return of_numbers(EntropyThreshold, config.entropy_threshold)
        case "entropy" | "maskgit_plus" | "topk_margin":
            return DreamOrder(share_S=jnp.asarray(shares(steps, eps=decode.eps)), score=SCORES[decode.policy])
        case "apd":
            return apd.build(config.apd, sampler=sampler, verifier=verifier, end_ids=end_ids)
        case "learn2pd" if filter_:
            threshold = jnp.float32(config.learn2pd.threshold)
            return Learn2pd(filter_.params, threshold, steps_per_block, filter_.graphdef)
        case "dico":
            return dico.build(
                config.dico,
                block_length=block_length,
                gen_length=decode.gen_length,
                mask_id=mask_id,
                traced=config.output.trace,
            )
    raise ValueError(f"no policy {decode.policy!r}")


def of_numbers(policy: type[P], settings: Any, **given: Any) -> P:
    """A policy whose fields are the settings of its section: numbers become arrays, static fields stay as they are.

    Args:
        policy: its class.
        settings: the section.
        given: the other fields.
    """
    arrays = {float: jnp.float32, int: jnp.int32, bool: jnp.bool_}
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]
        if field.name not in given:
            value = getattr(settings, field.name)
            given[field.name] = arrays[type(value)](value) if field.metadata.get("pytree_node", True) else value
    return policy(**given)
