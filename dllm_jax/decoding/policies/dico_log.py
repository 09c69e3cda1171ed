"""What DiCo tells about its phases: forwards of each, and on request the seeds and clusters of every forward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

PHASES = ("divide", "conquer", "finalize")


@struct.dataclass
class Forward:
    """What happened in one forward of a row; Q positions of its block."""

    phase: Int[Array, ""]
    start: Int[Array, ""]  # generated position of the block's first
    seed_Q: Int[Array, "Q"]  # k for the k-th seed, 0 elsewhere
    before_Q: Bool[Array, "Q"]  # the clusters it found
    after_Q: Bool[Array, "Q"]  # and made, before those that Divide hands over lose their committed ends


@struct.dataclass
class PhaseLog:
    """The log of a row; of a batch, with one more axis in front."""

    forwards_3: Int[Array, "3"]  # by phase
    trace: Forward | None  # of all forwards, with their axis in front

    @classmethod
    def empty(cls, *, forwards: int, block_length: int) -> "PhaseLog":
        """The log before the first forward, with a trace of at most so many (0: none)."""
        shape = (forwards, block_length)
        trace = Forward(
            phase=jnp.zeros(forwards, jnp.int8),
            start=jnp.zeros(forwards, jnp.int32),
            seed_Q=jnp.zeros(shape, jnp.int16),
            before_Q=jnp.zeros(shape, bool),
            after_Q=jnp.zeros(shape, bool),
        )
        return cls(jnp.zeros(len(PHASES), jnp.int32), trace if forwards else None)

    def add(self, forward: Forward, *, nfe: Int[Array, ""]) -> "PhaseLog":
        """The log with one more forward; `nfe` came before it."""
        trace = self.trace and jax.tree.map(
            lambda all_F, new: all_F.at[nfe].set(new.astype(all_F.dtype)), self.trace, forward
        )
        return PhaseLog(self.forwards_3.at[forward.phase].add(1), trace)

    def row(self, i: int) -> dict[str, Any]:
        """Fields of an output line for row `i` of a batch, on the host.

        Returns:
            `forwards_by_phase`; with a trace also `forwards`, for each of them its phase, its seeds in the order
            chosen, and the clusters [first, last] before and after. Positions count from the start of the generation.
        """
        counts = self.forwards_3[i].tolist()
        fields: dict[str, Any] = {"forwards_by_phase": dict(zip(PHASES, counts, strict=True))}
        if self.trace:
            trace = jax.tree.map(lambda x: np.asarray(x[i]), self.trace)
            fields["forwards"] = [_told(jax.tree.map(lambda x, f=f: x[f], trace)) for f in range(sum(counts))]
        return fields


def _told(forward: Forward) -> dict[str, Any]:
    seeds = np.argsort(forward.seed_Q, kind="stable")[np.count_nonzero(forward.seed_Q == 0) :]
    return {
        "phase": PHASES[int(forward.phase)],
        "seeds": (seeds + forward.start).tolist(),
        "clusters_before": _borders(np.asarray(forward.before_Q), int(forward.start)),
        "clusters_after": _borders(np.asarray(forward.after_Q), int(forward.start)),
    }


def _borders(cluster_Q: Bool[np.ndarray, "Q"], start: int) -> list[list[int]]:
    """First and last position of every cluster."""
    edges = np.diff(cluster_Q.astype(np.int8), prepend=0, append=0)
    first, behind = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return (np.stack([first, behind - 1], axis=1) + start).tolist()
