"""Canvases: where prompt, answer and padding lie, which lengths come, every sample as often, continued from a state."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from dllm_jax.data.canvases import Canvases, canvas_batches, held_out_canvases, packed_canvases
from dllm_jax.data.packing import Example
from dllm_jax.errors import UsageError

EOS = 99
SETTINGS: dict[str, Any] = {"batch_size": 4, "seed": 0, "eos_id": EOS}
BUCKETED = SETTINGS | {"buckets": (8, 12, 16), "spread": True, "full_share": 0.5, "shortest": 6}
PACKED = SETTINGS | {"length": 16, "most_padding": 3}


def example(first: int, size: int, *, prompt: int = 2, ordered: bool = False) -> Example:
    order = np.where(np.arange(size) < prompt, 0, np.arange(size)).astype(np.int32) if ordered else None
    return Example(np.arange(first, first + size, dtype=np.int32), prompt, order)


def examples(count: int, *, sizes: tuple[int, ...] = (4, 5, 9, 14)) -> list[Example]:
    """Each begins with its own number."""
    return [example(i * 100, sizes[i % len(sizes)]) for i in range(count)]


def bucketed(drawn: list[Example], **changed: Any) -> Iterator[Canvases]:
    return canvas_batches(drawn, **(BUCKETED | changed))


def packed(drawn: list[Example], **changed: Any) -> Iterator[Canvases]:
    return packed_canvases(drawn, **(PACKED | changed))


def same(one: Canvases, other: Canvases) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def ends(batch: Canvases) -> list[int]:
    return (batch.segments_BL > 0).sum(1).tolist()


def test_a_full_canvas_has_eos_to_its_end_and_all_behind_the_prompt_may_be_masked() -> None:
    batch = next(bucketed([example(10, 5, ordered=True)], buckets=(8,), full_share=1.0, batch_size=1))
    assert [x[0].tolist() for x in batch] == [
        [10, 11, 12, 13, 14, EOS, EOS, EOS],
        [False] * 2 + [True] * 6,
        [False] * 5 + [True] * 3,
        list(range(8)),
        [1] * 8,
        [0, 0, 2, 3, 4, 0, 0, 0],
    ]
    assert [x.dtype for x in batch] == [np.int32, bool, bool, np.int32, np.int32, np.int32]


def test_behind_the_end_of_a_canvas_nothing_is_attended_or_masked() -> None:
    batches = list(islice(bucketed(examples(8), full_share=0.0), 50))
    assert any(end < batch.tokens_BL.shape[1] for batch in batches for end in ends(batch))
    for batch in batches:
        for row, end in enumerate(ends(batch)):
            tokens, noised, padding, positions, segments, _ = (x[row] for x in batch)
            size = (tokens != EOS).sum()
            assert tokens[:size].tolist() == list(range(tokens[0], tokens[0] + size))
            assert end >= max(size, 6)
            assert segments.tolist() == [1] * end + [0] * (len(tokens) - end)
            assert positions.tolist() == list(range(end)) + [0] * (len(tokens) - end)
            assert noised.tolist() == [False] * 2 + [True] * (end - 2) + [False] * (len(tokens) - end)
            assert padding.tolist() == [False] * size + [True] * (end - size) + [False] * (len(tokens) - end)


def test_ends_are_uniform_from_the_sample_or_the_shortest_and_drawn_anew() -> None:
    both = [example(0, 4), example(100, 11)] * 500
    batches = islice(bucketed(both, buckets=(15,), full_share=0.2), 1000)
    drawn: dict[int, Counter[int]] = {0: Counter(), 100: Counter()}
    for batch in batches:
        for first, end in zip(batch.tokens_BL[:, 0].tolist(), ends(batch), strict=True):
            drawn[first][end] += 1
    for first, least in ((0, 6), (100, 11)):
        assert sum(drawn[first].values()) == 2000
        columns = range(least, 16)
        expected = {end: 2000 * (0.8 / len(columns) + 0.2 * (end == 15)) for end in columns}
        assert dict(drawn[first]) == {end: pytest.approx(n, abs=4.5 * n**0.5) for end, n in expected.items()}


def test_a_bucket_below_the_shortest_canvas_has_full_rows_only() -> None:
    batches = list(islice(bucketed(examples(8, sizes=(4,)), shortest=12, full_share=0.0), 30))
    assert {batch.tokens_BL.shape[1] for batch in batches} == {8, 12, 16}
    assert {end for batch in batches for end in ends(batch) if batch.tokens_BL.shape[1] < 16} == {8, 12}


def test_samples_are_spread_over_the_buckets_that_hold_them() -> None:
    drawn = examples(300, sizes=(4, 9, 14))
    seen = {
        (batch.tokens_BL.shape, first % 300, first) for batch in islice(bucketed(drawn), 400) for first in firsts(batch)
    }
    counts = Counter((size, kind) for (_, size), kind, _ in seen)
    assert len(seen) == 300  # every sample came, and in one bucket only
    assert counts[16, 200] == 100
    assert counts[12, 100] + counts[16, 100] == counts[8, 0] + counts[12, 0] + counts[16, 0] == 100
    assert all(30 < counts[size, 100] < 70 for size in (12, 16))
    assert all(15 < counts[size, 0] < 55 for size in (8, 12, 16))


def firsts(batch: Canvases) -> list[int]:
    return batch.tokens_BL[:, 0].tolist()


def test_without_spread_samples_take_the_smallest_bucket() -> None:
    batches = islice(bucketed(examples(40), spread=False), 60)
    seen = {(batch.tokens_BL.shape[1], first // 100 % 4) for batch in batches for first in firsts(batch)}
    assert seen == {(8, 0), (8, 1), (12, 2), (16, 3)}


def test_samples_come_equally_often_whatever_their_bucket() -> None:
    drawn = Counter(first for batch in islice(bucketed(examples(60)), 300) for first in firsts(batch))
    assert len(drawn) == 60
    assert all(17 <= count <= 23 for count in drawn.values())  # 20 each


def test_a_sample_keeps_its_bucket_when_others_are_added() -> None:
    def buckets(count: int) -> set[tuple[int, int]]:
        batches = islice(bucketed(examples(count)), 200)
        return {(first, batch.tokens_BL.shape[1]) for batch in batches for first in firsts(batch)}

    assert buckets(40) < buckets(60)


@pytest.mark.parametrize("draw", [bucketed, packed])
def test_the_seed_decides_everything(draw: Any) -> None:
    first, again, other = (list(islice(draw(examples(20), seed=seed), 8)) for seed in (3, 3, 4))
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


@pytest.mark.parametrize(("draw", "done"), [(bucketed, 3), (bucketed, 47), (packed, 3), (packed, 47)])
def test_it_continues_with_the_next_batch(draw: Any, done: int) -> None:
    whole = list(islice(draw(examples(20)), done + 5))
    interrupted = draw(examples(20))
    list(islice(interrupted, done))
    state = json.loads(json.dumps(interrupted.get_state()))
    continued = draw(examples(20))
    continued.set_state(state)
    assert all(map(same, whole[done:], islice(continued, 5)))


def test_fewer_samples_than_rows_repeat() -> None:
    batch = next(bucketed([example(0, 4)], batch_size=7))
    assert firsts(batch) == [0] * 7


def test_packed_rows_hold_canvases_apart_each_with_padding_of_its_own() -> None:
    paddings: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for batch in islice(packed(examples(20)), 200):
        assert batch.tokens_BL.shape == (4, 16)
        for tokens, noised, _, positions, segments, order in zip(*batch, strict=True):
            assert not order.any()
            assert tokens[segments == 0].tolist() == [EOS] * (segments == 0).sum()
            assert not noised[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                own = segments == segment
                size = (tokens[own] != EOS).sum()
                assert tokens[own][:size].tolist() == list(range(tokens[own][0], tokens[own][0] + size))
                assert positions[own].tolist() == list(range(own.sum()))
                assert noised[own].tolist() == [False] * 2 + [True] * (own.sum() - 2)
                seen[int(tokens[own][0])] += 1
                if size < 13:
                    paddings[int(own.sum() - size)] += 1
    assert len(seen) == 20
    total = sum(paddings.values())
    assert dict(paddings) == {n: pytest.approx(total / 4, rel=0.15) for n in range(4)}


def test_packed_rows_keep_the_order_and_say_what_is_padding() -> None:
    drawn = [example(0, 5, ordered=True)]
    batch = next(packed(drawn, length=6, most_padding=1))
    for end, noised, padding, order in zip(ends(batch), batch.noised_BL, batch.padding_BL, batch.order_BL, strict=True):
        assert noised.tolist() == [False] * 2 + [True] * (end - 2) + [False] * (6 - end)
        assert padding.tolist() == [False] * 5 + [True] * (end - 5) + [False] * (6 - end)
        assert order.tolist() == [0, 0, 2, 3, 4, 0]
    assert set(ends(batch)) == {5, 6}


def test_held_out_samples_come_once_in_order_on_full_canvases() -> None:
    drawn = examples(10)
    got = list(held_out_canvases(drawn, buckets=(8, 12, 16), batch_size=4, eos_id=EOS))
    assert [batch.tokens_BL.shape for batch in got] == [(4, 8), (4, 8), (4, 12), (4, 16)]
    assert [first for batch in got for first in firsts(batch)] == [
        *(0, 100, 400, 500),
        *(800, 900, EOS, EOS),
        *(200, 600, EOS, EOS),
        *(300, 700, EOS, EOS),
    ]
    assert ends(got[1]) == [8, 8, 0, 0]
    for empty in (2, 3):
        assert [x[empty].tolist() for x in got[1]] == [[EOS] * 8, [False] * 8, [False] * 8, [0] * 8, [0] * 8, [0] * 8]
    assert sum(int(batch.noised_BL.sum()) for batch in got) == 6 * 6 + 2 * 10 + 2 * 14


def test_texts_without_a_prompt_are_masked_from_the_first_token() -> None:
    (batch,) = held_out_canvases([example(10, 3, prompt=0)], buckets=(4,), batch_size=1, eos_id=EOS)
    assert batch.noised_BL.all()
    assert batch.padding_BL[0].tolist() == [False] * 3 + [True]


def test_a_sample_as_long_as_the_largest_bucket_fits_and_a_longer_one_is_refused() -> None:
    assert ends(next(bucketed([example(0, 16)], full_share=0.0))) == [16] * 4
    with pytest.raises(UsageError, match=r"data\.buckets: expected room for 17 tokens.*got 16"):
        bucketed([example(0, 5), example(0, 17)])
    with pytest.raises(UsageError, match=r"data\.buckets: expected room for 17 tokens.*got 16"):
        held_out_canvases([example(0, 17)], buckets=(8, 16), batch_size=1, eos_id=EOS)
    assert ends(next(packed([example(0, 16)]))) == [16] * 4
    with pytest.raises(UsageError, match=r"data\.length: expected room for 17 tokens.*got 16"):
        packed([example(0, 17)])
