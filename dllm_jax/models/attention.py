"""What queries see of the keys, and attention to that: the kernels, and the one place that chooses among them.

Shape letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.mesh import batch_multiple

CUDNN_LENGTH_MULTIPLE = 64
NOWHERE = -1e30  # score of a key that a query does not see
CHUNKED_QUERIES, CHUNK = 256, 64  # the least queries; those of a chunk
SPLIT_QUERIES, SPLIT_KEYS, SPLIT_CHUNKS = 64, 1024, 4  # the most queries, the least keys; chunks of these
SPLASH_KEY_MULTIPLE = 128
SPLASH_HEAD_DIMS = (64, 128, 256)


@struct.dataclass
class Visible:
    """A query sees the keys that are real, not behind its last column, and of its own segment."""

    real_BS: Bool[Array, "B S"]  # neither padding nor behind the text
    last_BT: Int[Array, "#B T"] | None = None  # the last column that a query sees; None: there is no such bound
    segment_BT: Int[Array, "B T"] | None = None  # the sample of every token of packed rows, where S = T
    pattern_BTS: Bool[Array, "B T S"] | None = None  # what else a query may see, if that is all its own

    @property
    def mask(self) -> Bool[Array, "B 1 #T S"]:
        """True where a query may look at a key."""
        mask = self.real_BS[:, None, None, :]
        if self.last_BT is not None:
            columns_S = jnp.arange(self.real_BS.shape[1])
            mask = mask & (columns_S[None, None, None, :] <= self.last_BT[:, None, :, None])
        if self.segment_BT is not None:
            mask = mask & (self.segment_BT[:, None, :, None] == self.segment_BT[:, None, None, :])
        if self.pattern_BTS is not None:
            mask = mask & self.pattern_BTS[:, None]
        return mask


def visible(
    real_BS: Bool[Array, "B S"],
    positions_BT: Int[Array, "#B T"],
    *,
    start: Int[Array, ""] | Int[Array, "B"] | None,
    causal_block: int,
    segment_BT: Int[Array, "B T"] | None,
    pattern_BTS: Bool[Array, "B T S"] | None = None,
) -> Visible:
    """What the model's configuration lets the queries see.

    Args:
        real_BS: the keys that hold text.
        positions_BT: position of every query in its own text.
        start: column of the first query among the keys, for all rows or per row; None: 0.
        causal_block: see `TransformerConfig`.
        segment_BT: the sample of every token, if rows are packed.
        pattern_BTS: what else every query may see.
    """
    if not causal_block:
        return Visible(real_BS, segment_BT=segment_BT, pattern_BTS=pattern_BTS)
    first = 0 if start is None else start
    columns_BT = jnp.atleast_1d(first)[:, None] + jnp.arange(positions_BT.shape[1])[None, :]
    return Visible(real_BS, columns_BT + causal_block - 1 - positions_BT % causal_block, segment_BT, pattern_BTS)


@struct.dataclass
class Watch:
    """Whose attention is told: queries side by side, in the last layers."""

    first: Int[Array, ""] | Int[Array, "B"]  # of the queries, for all rows or per row; they may stick out
    width: int = struct.field(pytree_node=False)  # Q, of them
    layers: int = struct.field(pytree_node=False)


class Looks(NamedTuple):
    """How much columns look at each other: a mean over heads and layers. A row sums to 1."""

    rows_BQS: Float[Array, "B Q S"]  # of the queries watched
    column_mean_BS: Float[Array, "B S"]  # over the rows of all columns that hold text


def look(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], *, seen: Visible, watch: Watch) -> Looks:
    """The attention of one layer without a cache, which no kernel tells.

    Args:
        q: queries, as for `attend`.
        k: keys, of the same columns.
        seen: what the queries see.
        watch: whose rows.
    """
    is_head_N = (q != 0).any(axis=(0, 1, 3))  # others only make the heads come out even (`TransformerConfig.on_mesh`)

    def rows(q: Float[Array, "B T N H"], mask_BTS: Bool[Array, "B #T S"]) -> Float[Array, "B T S"]:
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -jnp.inf), axis=-1)
        weights_BNTS = weights.reshape(len(q), -1, *weights.shape[3:])
        return jnp.einsum("bnts,n->bts", weights_BNTS, is_head_N / is_head_N.sum())

    room, mask_BTS = ((0, 0), (0, watch.width), (0, 0)), seen.mask[:, 0]
    first_B = jnp.broadcast_to(watch.first, (len(q),))
    watched = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, watch.width, axis=0))
    real_BT1 = seen.real_BS[:, :, None]
    mean_BS = jnp.where(real_BT1, rows(q, mask_BTS), 0).sum(axis=1) / real_BT1.sum(axis=1)
    if mask_BTS.shape[1] > 1:
        mask_BTS = watched(jnp.pad(mask_BTS, room, constant_values=True), first_B)
    return Looks(rows(watched(jnp.pad(q, (*room, (0, 0))), first_B), mask_BTS), mean_BS)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, seen: Visible
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with the kernel that suits platform, dtype and shape.

    Args:
        q: queries; head n reads key/value head n // (N / K).
        k: keys, rotated.
        v: values.
        seen: what the queries see; one that sees nothing gets some finite mean of the values.
    """
    mesh = jax.sharding.get_abstract_mesh()  # of `jax.set_mesh`; its devices need not be here
    device = None if mesh.empty else mesh.abstract_device
    rows = len(q) if mesh.empty else -(-len(q) // batch_multiple(mesh))
    name = kernel(
        device.platform if device else "",
        q.dtype,
        rows=rows,
        queries=q.shape[1],
        keys=k.shape[1],
        head_dim=q.shape[-1],
        packed=seen.segment_BT is not None or seen.pattern_BTS is not None,
    )
    return KERNELS[name](q, k, v, seen)


def kernel(
    platform: str, dtype: np.dtype, *, rows: int, queries: int, keys: int, head_dim: int, packed: bool = False
) -> str:
    """The kernel to use, one of `KERNELS`.

    Args:
        platform: "cpu", "gpu" or "tpu"; anything else stands for one that is not known.
        dtype: of queries, keys and values.
        rows: B, on one device.
        queries: T.
        keys: S.
        head_dim: H.
        packed: whether rows hold several samples, or every query has keys of its own.
    """
    if dtype == jnp.float16 and platform != "gpu":
        return "xla_wide"
    if platform == "cpu" and dtype == jnp.float32 and queries >= CHUNKED_QUERIES:
        return "chunks"
    if dtype.itemsize != 2 or packed:
        return "xla"
    if platform == "tpu" and keys % SPLASH_KEY_MULTIPLE == 0 and head_dim in SPLASH_HEAD_DIMS:
        return "splash"
    if platform == "gpu" and keys % CUDNN_LENGTH_MULTIPLE == 0 and head_dim % 8 == 0:
        is_short = rows == 1 and queries <= SPLIT_QUERIES and keys >= SPLIT_KEYS
        return "split_keys" if is_short else "cudnn"
    return "xla"


def key_multiple(platform: str) -> int:
    """What the number of keys has to be a multiple of for the kernels of a platform; 1 where nothing is gained."""
    return {"tpu": SPLASH_KEY_MULTIPLE, "gpu": CUDNN_LENGTH_MULTIPLE}.get(platform, 1)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """The reference, anywhere."""
    if q.dtype == jnp.float64:
        return _float64(q, k, v, seen)
    return jax.nn.dot_product_attention(q, k, v, mask=seen.mask, implementation="xla")


def _float64(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """In float64, where JAX's own has its softmax in float32."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * q.shape[3] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1, where=seen.mask[:, :, None])
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _chunks(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """On CPUs: some queries at a time, whose scores stay in the processor's caches and are made again backwards.

    On 640 tokens and two cores a quarter of the time of JAX's own, forward and backward together.
    """
    batch, queries, heads, head_dim = q.shape
    padding = -queries % CHUNK
    mask = seen.mask[:, :, None]
    if mask.shape[3] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)), constant_values=True)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q_BKGTH = q.reshape(batch, -1, k.shape[2], heads // k.shape[2], head_dim).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def chunk(start: Int[Array, ""]) -> Float[Array, "B K G T H"]:
        part = jax.lax.dynamic_slice_in_dim(q_BKGTH, start, CHUNK, axis=3)
        seen_here = jax.lax.dynamic_slice_in_dim(mask, start, CHUNK, axis=3) if mask.shape[3] > 1 else mask
        scores = jnp.einsum("bkgth,bksh->bkgts", part, k_BKSH) * head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen_here, scores, NOWHERE), axis=-1)
        return jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH)

    attended = jax.lax.map(chunk, jnp.arange(0, queries + padding, CHUNK))  # [chunks, B, K, G, CHUNK, H]
    return attended.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)[:, :queries]


def _xla_wide(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """In float32, where float16 products cannot be summed in float32 (CPU, TPU)."""
    q_wide, k_wide, v_wide = (x.astype(jnp.float32) for x in (q, k, v))
    return _xla(q_wide, k_wide, v_wide, seen).astype(q.dtype)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """On NVIDIA GPUs in 16 bits; it takes certain numbers of queries only, and whole masks."""
    queries = q.shape[1]
    padding = ((0, 0), (0, -queries % CUDNN_LENGTH_MULTIPLE), (0, 0), (0, 0))
    mask = jnp.broadcast_to(seen.mask, (len(q), 1, queries, k.shape[1])).swapaxes(1, 2)
    q, mask = jnp.pad(q, padding), jnp.pad(mask, padding, constant_values=True).swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :queries]


def split_keys(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """Few queries of one row against many keys, where a kernel would keep a few cores busy only.

    Every chunk C of the keys has a softmax of its own; chunks are then weighted by their sums.
    """
    batch, queries, _, head_dim = q.shape
    kv_heads, chunks = k.shape[2], SPLIT_CHUNKS
    q_BTKGH = q.reshape(batch, queries, kv_heads, -1, head_dim)
    k_BCSKH, v_BCSKH = (x.reshape(batch, chunks, -1, kv_heads, head_dim) for x in (k, v))
    mask_BCTS = jnp.moveaxis(seen.mask[:, 0].reshape(batch, -1, chunks, k_BCSKH.shape[2]), 2, 1)
    scores = jnp.einsum("btkgh,bcskh->bckgts", q_BTKGH, k_BCSKH, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask_BCTS[:, :, None, None], scores, jnp.finfo(scores.dtype).min)
    most = scores.max(axis=-1, keepdims=True)
    odds = jnp.exp(scores - most)
    weight = odds.sum(axis=-1, keepdims=True) * jnp.exp(most - most.max(axis=1, keepdims=True))
    share = weight / weight.sum(axis=1, keepdims=True) / odds.sum(axis=-1, keepdims=True)
    means = jnp.einsum("bckgts,bcskh->bckgth", odds.astype(v.dtype), v_BCSKH, preferred_element_type=jnp.float32)
    attended_BKGTH = (share * means).sum(axis=1)
    return jnp.moveaxis(attended_BKGTH, 3, 1).reshape(q.shape).astype(q.dtype)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """On TPUs in bfloat16."""
    from dllm_jax.models.splash import splash  # elsewhere nobody waits for Pallas to be imported

    return splash(q, k, v, seen)


KERNELS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, Visible], jax.Array]] = {
    "xla": _xla,
    "chunks": _chunks,
    "xla_wide": _xla_wide,
    "cudnn": _cudnn,
    "split_keys": split_keys,
    "splash": _splash,
}
