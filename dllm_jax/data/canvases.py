"""Canvases to learn masked diffusion on: samples laid out with the EoS behind them, as they are decoded (Grain).

A canvas is a prompt, its answer with the token that ends it, and EoS up to the canvas' end. All behind the prompt may
be masked, EoS included (LLaDA, section 2.3). A model that has seen canvases of one length fails on longer ones, so the
lengths vary: by buckets, and by rows that end before their bucket does.

Batches are deterministic. Where an iterator stands is a small JSON object (`get_state`), and an iterator that is set to
it goes on with the very batch that would have followed.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Int

from dllm_jax.data.packing import IN_THIS_THREAD, PACKING_BINS, Example
from dllm_jax.errors import UsageError


class Canvases(NamedTuple):
    """Rows of one length, with one sample each, or several that must not see each other."""

    tokens_BL: Int[np.ndarray, "B L"]  # prompt ++ answer ++ EoS to the canvas' end; EoS behind it
    noised_BL: Bool[np.ndarray, "B L"]  # may be masked: the answer and the EoS behind it, within the canvas
    padding_BL: Bool[np.ndarray, "B L"]  # of these, the EoS behind the answer and the token that ends it
    positions_BL: Int[np.ndarray, "B L"]  # in the token's own sample; 0 behind the canvas' end
    segments_BL: Int[np.ndarray, "B L"]  # sample of the row, from 1; 0: not attended, as behind the canvas' end
    order_BL: Int[np.ndarray, "B L"]  # forward in which the model itself committed the token; 0: unknown

    @property
    def num_tokens(self) -> int:
        """Tokens that are attended."""
        return int((self.segments_BL > 0).sum())


_PACKED = ("tokens_BL", "noised_BL", "padding_BL", "order_BL")  # the other two are counted while rows are packed


def canvas_batches(
    examples: Sequence[Example],
    *,
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
    eos_id: int,
    spread: bool,
    full_share: float,
    shortest: int,
) -> grain.DatasetIterator[Canvases]:
    """Batches without end, each of one bucket, with one sample to a row.

    Every example belongs to one bucket, which its place and the seed decide; buckets come in turn, as often as their
    examples ask for. So all examples come equally often, each of them once in an epoch of its bucket.

    Args:
        examples: at least one, none longer than the largest bucket. New ones at the end change no other's bucket.
        buckets: canvas lengths, ascending; L of a batch is one of them.
        batch_size: B, rows.
        seed: of the buckets, the order and the ends.
        eos_id: the token that fills canvases.
        spread: an example is dealt to any bucket that holds it, so that short answers are seen on long canvases too;
            else to the smallest.
        full_share: share of the rows whose canvas ends where the bucket does. The others end at a column drawn
            uniformly, anew every time: from the end of their sample, or `shortest` if that is longer, to the bucket's.
        shortest: tokens of the shortest canvas.

    Returns:
        An iterator; `get_state` and `set_state` move it.

    Raises:
        UsageError: an example is longer than the largest bucket.
    """
    dealt = _deal(examples, buckets, seed=seed if spread else None)
    datasets = []
    for place, (bucket, own) in enumerate(dealt.items()):
        lay_out = functools.partial(
            _with_ends,
            length=bucket,
            eos_id=eos_id,
            full_share=full_share,
            shortest=shortest,
        )
        rows = grain.MapDataset.source(own).seed(_derived(seed, place)).shuffle().repeat()
        datasets.append(rows.batch(batch_size, drop_remainder=True, batch_fn=list).random_map(lay_out))
    mixed = grain.MapDataset.mix(datasets, [len(own) for own in dealt.values()])
    return iter(mixed.to_iter_dataset(IN_THIS_THREAD))


def packed_canvases(
    examples: Sequence[Example],
    *,
    length: int,
    batch_size: int,
    seed: int,
    eos_id: int,
    most_padding: int,
) -> grain.DatasetIterator[Canvases]:
    """Batches without end, with several canvases to a row: first fit, as `packing.training_batches`.

    Args:
        examples: at least one, none longer than `length`.
        length: L, tokens of a row.
        batch_size: B, rows.
        seed: of the order and the padding.
        eos_id: the token that fills canvases, and rows.
        most_padding: a canvas ends 0 to so many EoS behind its sample, a uniform draw, anew every time.

    Returns:
        An iterator; `get_state` and `set_state` move it.

    Raises:
        UsageError: an example is longer than a row.
    """
    _check_lengths(examples, length, field="data.length")

    def lay_out(example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = len(example.tokens)
        end = size + int(rng.integers(min(most_padding, length - size), endpoint=True))
        canvas = _canvases([example], np.array([end]), length=end, eos_id=eos_id)
        return {name: getattr(canvas, name)[0] for name in _PACKED}

    rows = grain.MapDataset.source(examples).seed(seed).shuffle().repeat().random_map(lay_out)
    packed = FirstFitPackIterDataset(
        rows.to_iter_dataset(IN_THIS_THREAD),
        length_struct=dict.fromkeys(_PACKED, length),
        num_packing_bins=PACKING_BINS,
        padding_struct=dict.fromkeys(_PACKED, 0) | {"tokens_BL": eos_id},
    )
    return iter(packed.batch(batch_size).map(_unpacked))


def held_out_canvases(
    examples: Sequence[Example], *, buckets: Sequence[int], batch_size: int, eos_id: int
) -> Iterator[Canvases]:
    """All examples once, each on a full canvas of the smallest bucket that holds it.

    Buckets come one after the other from the shortest, their examples in the order given; the last batch of each is
    filled up with empty rows, in which nothing is attended.

    Args:
        examples: none longer than the largest bucket.
        buckets: canvas lengths, ascending; L of a batch is one of them.
        batch_size: B, rows.
        eos_id: the token that fills canvases.

    Raises:
        UsageError: an example is longer than the largest bucket, before the first batch is asked for.
    """
    dealt = _deal(examples, buckets, seed=None)

    def batches() -> Iterator[Canvases]:
        for bucket, own in dealt.items():
            for start in range(0, len(own), batch_size):
                rows = own[start : start + batch_size]
                ends = np.full(len(rows), bucket)
                full = _canvases(rows, ends, length=bucket, eos_id=eos_id)
                yield _filled_up(full, batch_size, eos_id=eos_id)

    return batches()


def _with_ends(
    rows: Sequence[Example],
    rng: np.random.Generator,
    *,
    length: int,
    eos_id: int,
    full_share: float,
    shortest: int,
) -> Canvases:
    """Lays out a batch whose canvases end where the rng says: see `canvas_batches`."""
    sizes = [len(row.tokens) for row in rows]
    ends = rng.integers(np.maximum(sizes, min(shortest, length)), length, endpoint=True)
    ends[rng.random(len(rows)) < full_share] = length
    return _canvases(rows, ends, length=length, eos_id=eos_id)


def _canvases(rows: Sequence[Example], ends_B: Int[np.ndarray, "B"], *, length: int, eos_id: int) -> Canvases:
    """Lays out a sample to a row, its canvas up to where `ends_B` says."""
    tokens_BL = np.full((len(rows), length), eos_id, np.int32)
    order_BL = np.zeros((len(rows), length), np.int32)
    for place, row in enumerate(rows):
        tokens_BL[place, : len(row.tokens)] = row.tokens
        if row.order is not None:
            order_BL[place, : len(row.order)] = row.order
    columns_L = np.arange(length, dtype=np.int32)
    prompts_B, sizes_B = (np.array(x) for x in zip(*((r.prompt_length, len(r.tokens)) for r in rows), strict=True))
    inside_BL = columns_L < ends_B[:, None]
    noised_BL = inside_BL & (columns_L >= prompts_B[:, None])
    return Canvases(
        tokens_BL=tokens_BL,
        noised_BL=noised_BL,
        padding_BL=noised_BL & (columns_L >= sizes_B[:, None]),
        positions_BL=np.where(inside_BL, columns_L, 0),
        segments_BL=inside_BL.astype(np.int32),
        order_BL=order_BL,
    )


def _filled_up(canvases: Canvases, batch_size: int, *, eos_id: int) -> Canvases:
    """Adds empty rows."""
    missing = batch_size - len(canvases.tokens_BL)
    filled = Canvases(*(np.pad(x, ((0, missing), (0, 0))) for x in canvases))
    filled.tokens_BL[batch_size - missing :] = eos_id
    return filled


def _unpacked(packed: Mapping[str, np.ndarray]) -> Canvases:
    return Canvases(
        **{name: packed[name] for name in _PACKED},
        positions_BL=packed["tokens_BL_positions"],
        segments_BL=packed["tokens_BL_segment_ids"],
    )


def _deal(examples: Sequence[Example], buckets: Sequence[int], *, seed: int | None) -> dict[int, list[Example]]:
    """The examples of every bucket that has any: each in the smallest that holds it, or, with a seed, in any."""
    _check_lengths(examples, buckets[-1], field="data.buckets")
    first = np.searchsorted(buckets, [len(example.tokens) for example in examples])
    places = first
    if seed is not None:
        draws = np.random.default_rng(seed).random(len(examples))
        places = first + (draws * (len(buckets) - first)).astype(first.dtype)
    dealt: dict[int, list[Example]] = {bucket: [] for bucket in buckets}
    for place, example in zip(places, examples, strict=True):
        dealt[buckets[place]].append(example)
    return {bucket: own for bucket, own in dealt.items() if own}


def _check_lengths(examples: Sequence[Example], most: int, *, field: str) -> None:
    longest = max((len(example.tokens) for example in examples), default=0)
    if longest > most:
        raise UsageError(f"{field}: expected room for {longest} tokens, those of the longest sample, got {most}")


def _derived(seed: int, place: int) -> int:
    """A seed of the bucket's own."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
