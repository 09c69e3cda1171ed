"""The loss by hand-computed numbers, and what a prediction may not look at."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax.data.packing import Batch
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model, random_model
from dllm_jax.training import losses
from dllm_jax.training.losses import NextTokens, Sums
from tests.training.tiny import SHAPE

# Two samples in a row, then padding: prompt 0 1 with answer 2 0, prompt 1 with answer 1.
ROW = Batch(
    tokens_BT=np.array([[0, 1, 2, 0, 1, 1, 0, 0]], np.int32),
    is_answer_BT=np.array([[0, 0, 1, 1, 0, 1, 0, 0]], bool),
    positions_BT=np.array([[0, 1, 2, 3, 0, 1, 0, 0]], np.int32),
    segments_BT=np.array([[1, 1, 1, 1, 2, 2, 0, 0]], np.int32),
)


class Bigram:
    """Predicts the next token from the last one alone: row = last token, column = odds of the next."""

    config = types.SimpleNamespace(vocab_size=3)
    odds = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 6.0], [3.0, 4.0, 1.0]])

    def __call__(self, tokens, positions, *, real_BS, segment_BT):
        return jax.nn.one_hot(tokens, 3), None

    def unembed(self, hidden):
        return jnp.log(hidden @ self.odds)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SHAPE, dtype=jnp.dtype("float32"), mesh=make_mesh(data=1), seed=0)


@jax.jit
def sums_of(graphdef, params, batch: Batch) -> Sums:
    return NextTokens().sums(nnx.merge(graphdef, params), batch)


@pytest.mark.parametrize("logit_bytes", [2**28, 40, 1])
def test_only_answer_tokens_count(monkeypatch: pytest.MonkeyPatch, logit_bytes: int) -> None:
    """The answer tokens: 2 after 1 (6/8, the likeliest), 0 after 2 (3/8, not the likeliest), 1 after 1 (1/8)."""
    monkeypatch.setattr(losses, "LOGIT_BYTES", logit_bytes)  # one slice, three, one token each
    sums = NextTokens().sums(Bigram(), ROW)
    assert float(sums.tokens) == 3
    assert float(sums.correct) == 1
    assert float(sums.loss) == pytest.approx(-np.log(6 / 8 * 3 / 8 * 1 / 8), abs=1e-5)


def test_a_row_of_padding_counts_nothing() -> None:
    sums = NextTokens().sums(Bigram(), Batch(*map(np.zeros_like, ROW)))
    assert jax.tree.leaves(sums) == [0, 0, 0, 0]


def packed(*, answer_at: int, tokens: list[int], segments: list[int]) -> Batch:
    """One row in which a single token counts."""
    positions = [segments[:t].count(segment) for t, segment in enumerate(segments)]
    counted = [t == answer_at for t in range(len(tokens))]
    return Batch(
        *(
            np.array([x], dtype)
            for x, dtype in ((tokens, np.int32), (counted, bool), (positions, np.int32), (segments, np.int32))
        )
    )


def test_a_prediction_sees_what_is_before_it_in_its_own_sample_only(model: Model) -> None:
    tokens, segments = [5, 6, 7, 8, 9, 10, 11, 12], [1, 1, 1, 2, 2, 2, 2, 0]

    def loss(place: int | None = None) -> float:
        changed = [token + 13 * (t == place) for t, token in enumerate(tokens)]
        batch = packed(answer_at=5, tokens=changed, segments=segments)
        return float(sums_of(model.graphdef, model.params, batch).loss)

    base = loss()
    assert [loss(place) == base for place in range(8)] == [True, True, True, False, False, False, True, True]


def test_packed_samples_have_the_loss_they_have_alone(model: Model) -> None:
    tokens, segments = [5, 6, 7, 8, 9, 10, 11, 12], [1, 1, 1, 1, 2, 2, 2, 2]
    together = packed(answer_at=6, tokens=tokens, segments=segments)
    alone = packed(answer_at=2, tokens=[*tokens[4:], 0, 0, 0, 0], segments=[1, 1, 1, 1, 0, 0, 0, 0])
    losses_of = [float(sums_of(model.graphdef, model.params, batch).loss) for batch in (together, alone)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)
