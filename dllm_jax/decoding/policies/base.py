"""The contract of a commit policy: which of the predicted tokens are written in this step.

A policy is a `flax.struct.dataclass` of the class `Policy`: its numbers are traced leaves (a sweep compiles once), what
changes the program is a static field. To add a decoder, add a file here and a line in `build.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.prediction import Prediction, Sampler
from dllm_jax.decoding.sampling import Noise, top_n
from dllm_jax.decoding.state import DecodeState
from dllm_jax.models.attention import Looks
from dllm_jax.models.cache import Cache


class Parts(NamedTuple):
    """What a policy is made of besides its settings."""

    sampler: Sampler  # how tokens are drawn
    end_ids: tuple[int, ...]  # the tokens that end a text
    mask_id: int  # the token of a masked position
    companions: Mapping[str, Any]  # networks that the policy brings along, by name; see `companions.py`
    block_length: int  # columns of a block
    block_causal: bool  # the model is causal by blocks


class Wants(NamedTuple):
    """What a policy asks of a forward beyond the prediction of its slots; what is not asked for costs nothing."""

    logits: bool = False  # `Prediction.logits_BQV`, however many slots there are
    canvas: bool = False  # `View.known_BL` and `View.confidence_BL`
    attention: int = 0  # `View.looks`, the mean over this many of the last layers
    shadow: bool = False  # `View.shadow_BQ`: one more masked column per slot in every forward


class Sizes(NamedTuple):
    """Static sizes of a decode."""

    slots: int  # Q
    vocab: int  # V


@struct.dataclass
class View:
    """What a policy sees of the step: Q slots at the columns start + arange(Q) of every row."""

    start_B: Int[Array, "B"]  # canvas column of the first slot
    position_BQ: Int[Array, "B Q"]  # generated position of every slot, from 0
    open_BQ: Bool[Array, "B Q"]  # masked, in the open range, before the row's end
    block_BQ: Bool[Array, "B Q"]  # in the open range, before the row's end
    token_BQ: Int[Array, "B Q"]  # what stands there
    pad_B: Int[Array, "B"]  # first column of the prompt
    end_B: Int[Array, "B"]  # one past the row's last column
    filled_B: Int[Array, "B"]  # tokens in the generation, up to the row's end
    row_B: Int[Array, "B"]
    nfe_B: Int[Array, "B"]  # the row's forwards before this one, but for those that only closed a block
    block_nfe_B: Int[Array, "B"]  # of which in this block; 0 = a new block
    closing_B: Bool[Array, "B"]  # the forward was of the block before: nothing is open, the policy is not heeded
    known_BL: Bool[Array, "B L"] | None = None  # columns of text that hold a token; see `Wants`
    confidence_BL: Float[Array, "B L"] | None = None  # the model's confidence at every column; see `Wants`
    looks: Looks | None = None  # what every slot looks at, in the row where its logits are made; see `Wants`
    shadow_BQ: Float[Array, "B Q"] | None = None  # probability of `token_BQ` where its column is hidden; see `Wants`


class Commit(NamedTuple):
    """A policy's answer. The driver ignores it for rows that are not active."""

    mask_BQ: Bool[Array, "B Q"]  # slots to write; may be empty
    token_BQ: Int[Array, "B Q"]
    leave_B: Bool[Array, "B"]  # the row is done with its block, whatever is left in it
    policy_state: Any  # leading axis B; the driver freezes it for idle rows, but not what is `InPlace`
    end_B: Int[Array, "B"] | None = None  # where the row ends now, as a canvas column; None: as before
    failed_B: Bool[Array, "B"] | None = None  # rows for which a model of the policy's own met non-finite numbers
    accepted_BQ: Bool[Array, "B Q"] | None = None  # slots whose token a learned filter takes for final
    retract_BQ: Bool[Array, "B Q"] | None = None  # committed slots of the open range that are masked again
    edit_BQ: Bool[Array, "B Q"] | None = None  # committed slots of the open range that get `token_BQ` instead
    score_BQ: Float[Array, "B Q"] | None = None  # how sure the policy is of every slot; None: the confidence
    noted: tuple[Float[Array, "B Q"], ...] = ()  # see `Policy.noted`


@struct.dataclass
class InPlace:
    """A large part of a policy's state, keys and values of a model, that a step updates in place for all rows.

    Choosing between its old and new value row by row would copy it in every step; the policy sees to it that what idle
    rows write is never read.
    """

    value: Cache


@struct.dataclass
class PerSlot:
    """A part of a policy's state with an entry for every slot, [B, Q, ...].

    The driver lets it follow the columns of the slots: where the open range moves, entries move along and zeros come
    in; in a new block all are zero.
    """

    value: Any


@runtime_checkable
class PolicyLog(Protocol):
    """What a policy counts or records, arrays with a leading axis B; on the host a part of the result."""

    def row(self, i: int) -> dict[str, Any]:
        """Fields for the output line of row `i`."""


@struct.dataclass
class Reported:
    """The part of a policy's state that is a part of the result."""

    value: Any  # a `PolicyLog`
    always: bool = struct.field(pytree_node=False, default=False)  # new in forwards that only close a block, too


class Policy:
    """Decides what is committed. The methods below suit a policy that has no state and always commits a token."""

    @property
    def wants(self) -> Wants:
        """What it looks at besides the prediction of its slots; static."""
        return Wants()

    @property
    def noted(self) -> tuple[str, ...]:
        """Names of numbers per slot that a commit hands on for a trace (`traced.py`); without one nobody reads them."""
        return ()

    def most_forwards(self, geometry: Geometry) -> int:
        """The most forwards a row can need; one that is not done then ends with an error (CONTRIBUTING, Bounds).

        One per position, if every forward commits at least one token more than it takes back.
        """
        return geometry.gen_length

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> Any:
        """The policy's state before the first forward."""
        return ()

    def commit(self, policy_state: Any, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """Chooses among the open slots."""
        raise NotImplementedError


def full(open_BQ: Bool[Array, "B Q"], mask_BQ: Bool[Array, "B Q"]) -> Bool[Array, "B"]:
    """Rows whose block has no open slot left after this commit."""
    return ~(open_BQ & ~mask_BQ).any(axis=-1)


def best(score_BQ: Float[Array, "B Q"], open_BQ: Bool[Array, "B Q"]) -> Bool[Array, "B Q"]:
    """The open slot of the highest score, the first one of equals; none where nothing is open."""
    return top_n(score_BQ, open_BQ, jnp.ones(open_BQ.shape[0], jnp.int32))


def first_places(order_BQ: Int[Array, "B Q"], open_BQ: Bool[Array, "B Q"], n_B: Int[Array, "B"]) -> Bool[Array, "B Q"]:
    """The first n open slots of an `order`, or all."""
    return open_BQ & (jnp.argsort(order_BQ, axis=-1, stable=True) < n_B[:, None])


def reported(policy_state: Any) -> PolicyLog | None:
    """The log in a policy's state, if it keeps one."""
    parts = jax.tree.leaves(policy_state, is_leaf=lambda x: isinstance(x, Reported))
    return next((part.value for part in parts if isinstance(part, Reported)), None)
