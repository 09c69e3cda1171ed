"""What queries see, and the kernels against XLA."""

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.models.attention import kernel, visible

REAL_BS = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
COLUMNS_1S = np.arange(6)[None]
POSITIONS_BS = COLUMNS_1S - np.array([[1], [0]])


def mask(causal_block: int, *, first: int = 0, start: object = None, segment_BT: object = None) -> np.ndarray:
    """The mask [B, T, S] of the queries from a column on."""
    seen = visible(
        jnp.asarray(REAL_BS), jnp.asarray(POSITIONS_BS[:, first:]), start=start, causal_block=causal_block,
        segment_BT=segment_BT,
    ).mask  # fmt: skip
    return np.broadcast_to(seen, (2, 1, 6 - first, 6))[:, 0]


@pytest.mark.parametrize("block", [0, 1, 2, 4])
def test_a_query_sees_the_real_keys_up_to_the_end_of_its_block(block: int) -> None:
    of_B = POSITIONS_BS // block if block else np.zeros_like(POSITIONS_BS)
    expected = REAL_BS[:, None] & (of_B[:, None] <= of_B[:, :, None])
    np.testing.assert_array_equal(mask(block), expected)
    for start in (jnp.int32(2), jnp.array([2, 2])):  # the queries of a cached step
        np.testing.assert_array_equal(mask(block, first=2, start=start), expected[:, 2:])


def test_packed_samples_do_not_see_each_other() -> None:
    segment_BT = np.array([[0, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3]])
    expected = REAL_BS[:, None] & (segment_BT[:, None] == segment_BT[:, :, None])
    np.testing.assert_array_equal(mask(0, segment_BT=jnp.asarray(segment_BT)), expected)
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(mask(1, segment_BT=jnp.asarray(segment_BT)), expected & causal)


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("gpu", jnp.bfloat16, "cudnn"), ("gpu", jnp.float16, "cudnn"), ("gpu", jnp.float32, "xla"),
        ("cpu", jnp.bfloat16, "xla"), ("cpu", jnp.float16, "xla_wide"), ("", jnp.float16, "xla_wide"),
    ],
)  # fmt: skip
def test_the_kernel_follows_platform_and_dtype(platform: str, dtype: object, name: str) -> None:
    assert kernel(platform, jnp.dtype(dtype), queries=512, keys=512, head_dim=128) == name
