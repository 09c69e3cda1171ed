"""Layout of the canvas: padding, positions, masks, buckets."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax.decoding.blocks import Aligned, Sliding
from dllm_jax.decoding.caching import BlockCache, NoCache
from dllm_jax.decoding.canvas import Geometry, between, bucketed_prompt_length, pad_prompts, positions
from dllm_jax.decoding.generate import with_slack


def test_prompts_are_padded_on_the_left_and_masks_follow() -> None:
    geometry = Geometry(prompt_length=4, gen_length=2, block_length=1, slack=1)
    tokens_BL, pad_B = pad_prompts([[7, 8], [1, 2, 3, 4]], geometry, mask_id=9, pad_id=0)
    np.testing.assert_array_equal(tokens_BL, [[0, 0, 7, 8, 9, 9, 0], [1, 2, 3, 4, 9, 9, 0]])
    np.testing.assert_array_equal(pad_B, [2, 0])
    np.testing.assert_array_equal(positions(jnp.arange(6)[None], jnp.array(pad_B))[0], [-2, -1, 0, 1, 2, 3])


def test_only_real_columns_before_the_end_are_attended_to() -> None:
    mask = between(jnp.array([2, 0]), jnp.array([5, 3]), columns=6)
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@given(
    longest=st.integers(1, 4000),
    gen_length=st.integers(1, 1200),
    multiple=st.sampled_from([32, 64, 128]),
    waste=st.sampled_from([0.0, 0.125, 0.5, 3.0]),
    room=st.integers(0, 500),
)
def test_a_bucket_holds_the_prompt_and_wastes_little(
    longest: int, gen_length: int, multiple: int, waste: float, room: int
) -> None:
    needed, most = longest + gen_length, longest + room
    bucket = bucketed_prompt_length(longest, gen_length, multiple=multiple, waste=waste, most=most)
    length = bucket + gen_length
    assert bucket >= longest
    assert length % multiple == 0
    assert length - needed < multiple or length <= needed * (1 + waste)
    assert length - multiple < most + gen_length  # no longer than the longest prompt makes it, were it alone


def test_buckets_grow_with_the_prompts() -> None:
    def lengths(waste: float) -> list[int]:
        buckets = (bucketed_prompt_length(n, 64, multiple=64, waste=waste, most=1984) for n in range(1, 1985))
        return [bucket + 64 for bucket in dict.fromkeys(buckets)]

    assert lengths(0) == list(range(128, 2049, 64))
    assert lengths(0.125) == [*range(128, 1025, 64), 1152, 1280, 1408, 1536, 1728, 1920, 2048]
    assert lengths(0.5) == [128, 192, 256, 384, 576, 832, 1216, 1792, 2048]


def test_slack_rounds_the_columns_of_a_cache_up() -> None:
    geometry = Geometry(prompt_length=64, gen_length=320, block_length=32)
    cache = BlockCache(runs_suffix=True, block_width=geometry.block_length, lead=1)
    needed = cache.columns(geometry)
    assert needed > geometry.length
    assert with_slack(geometry, cache, Aligned(), multiple=1).columns == needed
    assert with_slack(geometry, cache, Aligned(), multiple=128).columns == 512
    assert with_slack(geometry, NoCache(), Aligned(), multiple=128).columns == geometry.length
    assert with_slack(geometry, NoCache(), Sliding(48), multiple=1).columns == geometry.length + 48
