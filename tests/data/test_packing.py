"""The order of the training data: by seed, every epoch complete, continued from its state."""

import json
from collections import Counter
from itertools import islice

import numpy as np

from dllm_jax.data.packing import Batch, Example, held_out_batches, training_batches
from tests.training.tiny import LENGTH, counting


def batches(seed: int = 0, examples: int = 40):
    return training_batches(counting(examples), length=LENGTH, batch_size=4, seed=seed)


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def samples(batch: Batch) -> list[tuple[int, ...]]:
    """The samples of a batch, put together from the segments."""
    return [
        tuple(tokens[segments == segment])
        for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def test_the_seed_decides_the_order() -> None:
    first, again, other = (list(islice(batches(seed), 5)) for seed in (0, 0, 1))
    assert all(map(same, first, again))
    assert not all(map(same, first, other))


def test_rows_hold_whole_samples_with_prompts_positions_and_padding() -> None:
    batch = next(batches())
    assert batch.tokens_BT.shape == (4, LENGTH)
    assert set(samples(batch)) <= {tuple(example.tokens) for example in counting(40)}
    for tokens, is_answer, positions, segments in zip(*batch, strict=True):
        assert max(segments) >= 2
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert positions[own].tolist() == list(range(own.sum()))
            assert is_answer[own].tolist() == [False] + [True] * (own.sum() - 1)
        assert not is_answer[segments == 0].any()
        assert not tokens[segments == 0].any()


def test_every_sample_comes_as_often() -> None:
    drawn = Counter(sample for batch in islice(batches(examples=30), 100) for sample in samples(batch))
    assert len(drawn) == 30
    assert min(drawn.values()) > 30
    assert max(drawn.values()) - min(drawn.values()) <= 10  # the rows that are still filled hold the difference


def test_it_continues_in_the_middle_of_an_epoch() -> None:
    whole = list(islice(batches(), 9))
    interrupted = batches()
    list(islice(interrupted, 4))
    continued = batches()
    continued.set_state(json.loads(json.dumps(interrupted.get_state())))
    assert all(map(same, whole[4:], islice(continued, 5)))


def test_held_out_samples_come_once_and_the_last_batch_is_filled_up() -> None:
    examples = counting(10)
    got = list(held_out_batches(examples, length=LENGTH, batch_size=4))
    assert {batch.tokens_BT.shape for batch in got} == {(4, LENGTH)}
    assert sorted(sample for batch in got for sample in samples(batch)) == sorted(tuple(e.tokens) for e in examples)
    assert sum(int(batch.is_answer_BT.sum()) for batch in got) == sum(len(e.answer) for e in examples)


def test_a_sample_as_long_as_a_row_fits() -> None:
    example = Example(np.arange(1, LENGTH + 1, dtype=np.int32), 3)
    (batch,) = held_out_batches([example], length=LENGTH, batch_size=1)
    assert batch.tokens_BT[0].tolist() == example.tokens.tolist()
