"""The contract of a commit policy: which of the predicted tokens are written in this step.

A policy is a `flax.struct.dataclass`: its numbers are traced leaves (a sweep compiles once), what changes the program
is a static field. To add a decoder, add a file here and a line in `build.py`.
"""

from typing import Any, NamedTuple, Protocol

from flax import struct
from jaxtyping import Array, Bool, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.decoding.state import DecodeState


@struct.dataclass
class View:
    """What a policy sees of the step: Q slots at the columns start + arange(Q) of every row."""

    start_B: Int[Array, "B"]  # canvas column of the first slot
    position_BQ: Int[Array, "B Q"]  # generated position of every slot, from 0
    open_BQ: Bool[Array, "B Q"]  # masked, in the row's block, before its end
    pad_B: Int[Array, "B"]  # first column of the prompt
    end_B: Int[Array, "B"]  # one past the row's last column
    filled_B: Int[Array, "B"]  # tokens in the generation, up to the row's end
    row_B: Int[Array, "B"]
    nfe_B: Int[Array, "B"]  # the row's forwards before this one
    block_nfe_B: Int[Array, "B"]  # of which in this block; 0 = a new block


class Commit(NamedTuple):
    """A policy's answer. The driver ignores it for rows that are not active."""

    mask_BQ: Bool[Array, "B Q"]  # slots to write; may be empty
    token_BQ: Int[Array, "B Q"]
    leave_B: Bool[Array, "B"]  # the row is done with its block, whatever is left in it
    rows: Any  # the policy's own state, leading axis B; the driver freezes it for idle rows, but not what is `InPlace`
    end_B: Int[Array, "B"] | None = None  # where the row ends now, as a canvas column; None: as before
    failed_B: Bool[Array, "B"] | None = None  # rows for which a model of the policy's own met non-finite numbers
    accepted_BQ: Bool[Array, "B Q"] | None = None  # slots whose token a learned filter takes for final


@struct.dataclass
class InPlace:
    """A large part of a policy's state (a verifier's keys and values) that a step updates in place for all rows.

    Choosing between its old and new value row by row would copy it in every step; the policy sees to it that what idle
    rows write is never read.
    """

    value: Any


class PolicyLog(Protocol):
    """What a policy counts or records, arrays with a leading axis B; on the host a part of the result."""

    def row(self, i: int) -> dict[str, Any]:
        """Fields for the output line of row `i`."""


@struct.dataclass
class Reported:
    """The part of a policy's state that is a part of the result."""

    value: Any  # a `PolicyLog`


class CommitPolicy(Protocol):
    """Decides what is committed."""

    def most_forwards(self, geometry: Geometry) -> int:
        """The most forwards a row can need; one that is not done then ends with an error (CONTRIBUTING, Bounds)."""

    def init(self, state: DecodeState, geometry: Geometry) -> Any:
        """The policy's per-row state before the first forward."""

    def commit(self, rows: Any, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """Chooses among the open slots."""


def full(open_BQ: Bool[Array, "B Q"], mask_BQ: Bool[Array, "B Q"]) -> Bool[Array, "B"]:
    """Rows whose block has no open slot left after this commit."""
    return ~(open_BQ & ~mask_BQ).any(axis=-1)
