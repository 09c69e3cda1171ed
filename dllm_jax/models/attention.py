"""What queries see of the keys, and attention to that: the kernels, and the one place that chooses among them.

Shape letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

CUDNN_LENGTH_MULTIPLE = 64


@struct.dataclass
class Visible:
    """A query sees the keys that are real, not behind its last column, and of its own segment."""

    real_BS: Bool[Array, "B S"]  # neither padding nor behind the text
    last_BT: Int[Array, "#B T"] | None = None  # the last column that a query sees; None: there is no such bound
    segment_BT: Int[Array, "B T"] | None = None  # the sample of every token of packed rows, where S = T

    @property
    def mask(self) -> Bool[Array, "B 1 #T S"]:
        """True where a query may look at a key."""
        mask = self.real_BS[:, None, None, :]
        if self.last_BT is not None:
            columns_S = jnp.arange(self.real_BS.shape[1])
            mask = mask & (columns_S[None, None, None, :] <= self.last_BT[:, None, :, None])
        if self.segment_BT is not None:
            mask = mask & (self.segment_BT[:, None, :, None] == self.segment_BT[:, None, None, :])
        return mask


def visible(
    real_BS: Bool[Array, "B S"],
    positions_BT: Int[Array, "#B T"],
    *,
    start: Int[Array, ""] | Int[Array, "B"] | None,
    causal_block: int,
    segment_BT: Int[Array, "B T"] | None,
) -> Visible:
    """What the model's configuration lets the queries see.

    Args:
        real_BS: the keys that hold text.
        positions_BT: position of every query in its own text.
        start: column of the first query among the keys, for all rows or per row; None: 0.
        causal_block: see `TransformerConfig`.
        segment_BT: the sample of every token, if rows are packed.
    """
    if not causal_block:
        return Visible(real_BS, segment_BT=segment_BT)
    first = 0 if start is None else start
    columns_BT = jnp.atleast_1d(first)[:, None] + jnp.arange(positions_BT.shape[1])[None, :]
    return Visible(real_BS, columns_BT + causal_block - 1 - positions_BT % causal_block, segment_BT)


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
    device = jax.sharding.get_abstract_mesh().abstract_device  # of `jax.set_mesh`, also for devices that are not here
    name = kernel(
        device.platform if device else "", q.dtype, queries=q.shape[1], keys=k.shape[1], head_dim=q.shape[-1],
        packed=seen.segment_BT is not None,
    )  # fmt: skip
    return KERNELS[name](q, k, v, seen)


def kernel(platform: str, dtype: np.dtype, *, queries: int, keys: int, head_dim: int, packed: bool = False) -> str:
    """The kernel to use, one of `KERNELS`.

    Args:
        platform: "cpu", "gpu" or "tpu"; anything else stands for one that is not known.
        dtype: of queries, keys and values.
        queries: T.
        keys: S.
        head_dim: H.
        packed: whether rows hold several samples.
    """
    if dtype == jnp.float16 and platform != "gpu":
        return "xla_wide"
    fits_cudnn = queries % CUDNN_LENGTH_MULTIPLE == 0 and keys % CUDNN_LENGTH_MULTIPLE == 0 and head_dim % 8 == 0
    if platform == "gpu" and dtype.itemsize == 2 and fits_cudnn and not packed:
        return "cudnn"
    return "xla"


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """The reference, anywhere."""
    return jax.nn.dot_product_attention(q, k, v, mask=seen.mask, implementation="xla")


def _xla_wide(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """In float32, where float16 products cannot be summed in float32 (CPU, TPU)."""
    q_wide, k_wide, v_wide = (x.astype(jnp.float32) for x in (q, k, v))
    return _xla(q_wide, k_wide, v_wide, seen).astype(q.dtype)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> jax.Array:
    """On NVIDIA GPUs in 16 bits."""
    mask = jnp.broadcast_to(seen.mask, (len(q), 1, q.shape[1], k.shape[1]))  # it takes whole masks only
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


KERNELS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, Visible], jax.Array]] = {
    "xla": _xla, "xla_wide": _xla_wide, "cudnn": _cudnn,
}  # fmt: skip
