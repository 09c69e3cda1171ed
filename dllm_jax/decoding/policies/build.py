"""From settings to a policy."""

import jax.numpy as jnp

from dllm_jax.config import Config, block_schedule
from dllm_jax.decoding.policies.base import CommitPolicy
from dllm_jax.decoding.policies.confidence import Scheduled


def build_policy(config: Config) -> CommitPolicy:
    """The policy that `decode.policy` names."""
    decode = config.decode
    block_length, steps = block_schedule(decode)
    steps_per_block = jnp.int32(steps // (decode.gen_length // block_length))
    return Scheduled(steps_per_block=steps_per_block, shuffled=decode.policy == "random")
