"""Records whose rule is known."""

import numpy as np

from dllm_jax.training.filter.records import Records


def synthetic(*, prompts: int, steps: int, block_length: int = 8, first: int = 0) -> Records:
    """A token is right if the mean confidence of the position and its neighbours is above 0.8.

    Every prompt has `steps` records; its index, counted from `first`, decides them.
    """
    parts = []
    for prompt in range(first, first + prompts):
        rng = np.random.default_rng(prompt)
        confidence_SQ = rng.beta(4, 1, (steps, block_length)).astype(np.float32)
        padded = np.pad(confidence_SQ, ((0, 0), (1, 1)), mode="edge")
        smooth_SQ = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        masked_SQ = rng.random(confidence_SQ.shape) < 0.6
        prompt_S, step_S = np.full(steps, prompt, np.int32), np.arange(steps, dtype=np.int32)
        parts.append((confidence_SQ, smooth_SQ > 0.8, masked_SQ, prompt_S, step_S // block_length, step_S))
    return Records(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
