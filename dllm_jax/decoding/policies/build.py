"""Every policy by its name: how it is made of settings, and which networks it brings along."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from dllm_jax.config import Config
from dllm_jax.decoding.policies import apd, dico, dynamic, edit, learn2pd, traced
from dllm_jax.decoding.policies.base import Parts, Policy
from dllm_jax.decoding.policies.clad import Clad
from dllm_jax.decoding.policies.companions import Companion
from dllm_jax.decoding.policies.confidence import Scheduled, steps_per_block
from dllm_jax.decoding.policies.credit import Credit
from dllm_jax.decoding.policies.dawn import Dawn
from dllm_jax.decoding.policies.dream import SCORES, DreamOrder, shares
from dllm_jax.decoding.policies.entropy import EntropyBound, EntropyThreshold
from dllm_jax.decoding.policies.frechet import Frechet
from dllm_jax.decoding.policies.hierarchy import Hierarchy
from dllm_jax.decoding.policies.klass import Klass
from dllm_jax.decoding.policies.local_leap import LocalLeap
from dllm_jax.decoding.policies.r2 import R2
from dllm_jax.decoding.policies.threshold import Factor, Threshold
from dllm_jax.decoding.policies.wino import Wino
from dllm_jax.decoding.prediction import Sampler
from dllm_jax.models.model import Model
from dllm_jax.settings import DREAM_ORDERS, block_schedule

_ARRAYS = {float: jnp.float32, int: jnp.int32, bool: jnp.bool_}


def _as_it_is(config: Config, sampler: Sampler) -> Sampler:
    return sampler


class Recipe(NamedTuple):
    """How a policy is made."""

    build: Callable[[Config, Parts], Policy]
    companions: tuple[Companion, ...] = ()  # the networks that it may bring along
    sampler: Callable[[Config, Sampler], Sampler] = _as_it_is  # how tokens are drawn, if it has a say in that

    def make(self, config: Config, parts: Parts) -> Policy:
        """The policy, with `output.trace` inside one that records what it does."""
        policy = self.build(config, parts)
        return traced.around(policy, config, parts) if config.output.trace else policy


def of_fields(policy: type[Policy], *companions: Companion) -> Recipe:
    """A policy whose fields have names that are known.

    Settings of its own section (numbers become arrays, static fields stay as they are), `Parts`, companions.

    Args:
        policy: its class.
        companions: the networks that it brings along.
    """

    def make(config: Config, parts: Parts) -> Policy:
        section = getattr(config, config.decode.policy)
        known = {**parts._asdict(), **parts.companions}
        given = {}
        for field in dataclasses.fields(policy):  # type: ignore[arg-type]
            if field.name in known:
                given[field.name] = known[field.name]
                continue
            value = getattr(section, field.name)
            given[field.name] = _ARRAYS[type(value)](value) if field.metadata.get("pytree_node", True) else value
        return policy(**given)

    return Recipe(make, companions)


def _scheduled(config: Config, parts: Parts) -> Policy:
    fixed = parts.block_length if parts.block_causal else 0
    return Scheduled(steps_per_block(config.decode), shuffled=config.decode.policy == "random", fixed_masks=fixed)


def _dream_order(config: Config, parts: Parts) -> Policy:
    _, steps = block_schedule(config.decode)
    share_S = jnp.asarray(shares(steps, eps=config.decode.eps))
    return DreamOrder(share_S=share_S, score=SCORES[config.decode.policy])


def _dico(config: Config, parts: Parts) -> Policy:
    open_length = config.decode.sub_block_length or parts.block_length
    sizes = {"block_length": open_length, "gen_length": config.decode.gen_length}
    return dico.build(config.dico, **sizes, mask_id=parts.mask_id, traced=config.output.trace)


RECIPES = {  # decode.policy -> how it is made
    **dict.fromkeys(("low_confidence", "random"), Recipe(_scheduled)),
    **dict.fromkeys(DREAM_ORDERS, Recipe(_dream_order)),
    "threshold": of_fields(Threshold),
    "factor": of_fields(Factor),
    "frechet": of_fields(Frechet),
    "klass": of_fields(Klass),
    "local_leap": of_fields(LocalLeap),
    "dawn": of_fields(Dawn),
    "clad": of_fields(Clad),
    "wino": of_fields(Wino),
    "r2": of_fields(R2),
    "hierarchy": of_fields(Hierarchy),
    "credit": of_fields(Credit),
    "eb": of_fields(EntropyBound),
    "entropy_threshold": of_fields(EntropyThreshold),
    "apd": Recipe(apd.build, (apd.Verifier(),), sampler=apd.tempered),
    "learn2pd": Recipe(learn2pd.build, (learn2pd.LearnedFilter(),)),
    "dico": Recipe(_dico),
    "dynamic": Recipe(dynamic.build_dynamic),
    "sequential": Recipe(dynamic.build_sequential),
    "edit": Recipe(edit.build),
}


def every_companion() -> dict[str, Companion]:
    """The companions of all policies, by name."""
    return {companion.name: companion for recipe in RECIPES.values() for companion in recipe.companions}


def companions_of(config: Config) -> list[Companion]:
    """Those that the policy of these settings needs."""
    return [companion for companion in RECIPES[config.decode.policy].companions if companion.wanted(config)]


def open_companions(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Loads the networks that the policy needs, by the names of their companions.

    Args:
        config: all settings.
        mesh: of the model.

    Raises:
        UsageError: one is not named, or there is no such checkpoint.
    """
    return {companion.name: companion.open(config, mesh) for companion in companions_of(config)}


def checked(networks: Mapping[str, Any], config: Config, *, model: Model) -> dict[str, Any]:
    """Those of the networks that the policy needs.

    Args:
        networks: by the names of their companions; None is none.
        config: all settings.
        model: the diffusion model.

    Raises:
        TypeError: no companion has such a name.
        UsageError: one is missing, superfluous, or does not suit the settings or the model.
    """
    if unknown := sorted(set(networks) - set(every_companion())):
        raise TypeError(f"Decoder() got an unexpected keyword argument {unknown[0]!r}")
    found = {}
    for companion in RECIPES[config.decode.policy].companions:
        network = networks.get(companion.name)
        if not companion.wanted(config):
            if network is not None:
                companion.superfluous(config)
            continue
        if network is None:
            raise companion.missing(companion.name if companion.handed_over else companion.field)
        companion.check(network, config, model=model)
        found[companion.name] = network
    return found
