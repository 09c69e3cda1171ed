"""Flash attention on TPUs: JAX's splash kernel, which keeps the scores on the chip.

Shape letters as in `attention.py`; Q is all queries of one key/value head.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SegmentIds,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dllm_jax.mesh import ACTIVATIONS, spec
from dllm_jax.models.attention import SPLASH_KEY_MULTIPLE, Visible

QUERY_MULTIPLE = 16  # rows of a tile of 16-bit numbers
MOST_QUERIES, MOST_KEYS, MOST_AT_ONCE = 512, 2048, 512  # of a block, and keys of it at once: its scores fit into VMEM


def splash(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible, *, interpret: bool = False) -> jax.Array:
    """On TPUs in bfloat16: JAX's flash attention, on every device for its rows and its key/value heads.

    The queries of all heads that share a key/value head run as one sequence, so that keys and values are read once.

    Args:
        q: queries, as for `attend`.
        k: keys.
        v: values.
        seen: what the queries see, without segments.
        interpret: run the kernel's Python code, on any platform.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    sizes = block_sizes(groups * queries, k.shape[1])
    padding = -(groups * queries) % sizes.block_q
    q = (q * head_dim**-0.5).reshape(batch, queries, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q_BKQH = jnp.pad(q.reshape(batch, kv_heads, -1, head_dim), ((0, 0), (0, 0), (0, padding), (0, 0)))
    k_BKSH, v_BKSH = k.swapaxes(1, 2), v.swapaxes(1, 2)
    last_BQ = None
    if seen.last_BT is not None:
        last_BQ = jnp.tile(jnp.broadcast_to(seen.last_BT, (batch, queries)), (1, groups))
        last_BQ = jnp.pad(last_BQ, ((0, 0), (0, padding)))

    def of_row(q_KQH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, real_S: jax.Array, last_Q: Any) -> Any:
        run = SplashAttentionKernel(
            MaskInfo(None, None, None, None, q_sequence=last_Q),
            None,
            None,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None if last_Q is None else operator.ge,
            interpret=interpret,
        )
        segments = SegmentIds(q=jnp.ones(q_KQH.shape[1], jnp.int32), kv=real_S.astype(jnp.int32))
        with jax.default_matmul_precision("default"):  # the kernel refuses another one for products of bfloat16
            return run(q_KQH, k_KSH, v_KSH, segment_ids=segments)

    arguments = (q_BKQH, k_BKSH, v_BKSH, seen.real_BS, last_BQ)
    attended = _per_device(jax.vmap(of_row), *arguments)
    attended = attended[:, :, : groups * queries].reshape(batch, kv_heads, groups, queries, head_dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


def block_sizes(queries: int, keys: int) -> BlockSizes:
    """As few blocks as VMEM allows; a few more if the queries then need no padding.

    Args:
        queries: of one key/value head; they are padded to a multiple of `block_q`.
        keys: a multiple of `SPLASH_KEY_MULTIPLE`.
    """
    least = -(-queries // MOST_QUERIES)
    even = [count for count in range(least, 2 * least + 1) if queries % (count * QUERY_MULTIPLE) == 0]
    count = even[0] if even else least
    block_q = -(-queries // (count * QUERY_MULTIPLE)) * QUERY_MULTIPLE

    def divisor(of: int, most: int) -> int:
        return max(n for n in range(SPLASH_KEY_MULTIPLE, most + 1, SPLASH_KEY_MULTIPLE) if of % n == 0)

    block_kv = divisor(keys, MOST_KEYS)
    return BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=divisor(block_kv, MOST_AT_ONCE))


def _per_device(run: Callable[..., jax.Array], *arguments: jax.Array | None) -> jax.Array:
    """Runs a kernel that the compiler cannot split on every device's own rows [B, ...] and heads [B, K, ...]."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*arguments)
    axes = ("batch", "kv_heads", None, None)
    specs = tuple(
        None if x is None else spec(axes if x.ndim == 4 else ("batch", None), x.shape, mesh.shape, rules=ACTIVATIONS)
        for x in arguments
    )
    return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)
