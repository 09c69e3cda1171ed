"""The training pipeline: samples in a shuffled order without end, several packed into every row (Grain).

The iterator is deterministic, and its state is a small JSON object that belongs into a checkpoint. The order depends on
the seed only, so that a run that continues sees what an uninterrupted one would have seen.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Int

PACKING_BINS = 128  # rows that are filled at the same time: more of them leave fewer holes
IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # everything is in memory


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answer, as tokens."""

    tokens: Int[np.ndarray, "T"]  # prompt ++ answer, int32
    prompt_length: int  # at least 1, but for bare texts (`samples.read_texts`), which only canvases are made of
    order: Int[np.ndarray, "T"] | None = None  # forward in which a model committed the token, int32; 0: unknown

    @property
    def answer(self) -> Int[np.ndarray, "A"]:
        """The tokens of the answer."""
        return self.tokens[self.prompt_length :]


class Batch(NamedTuple):
    """Packed rows."""

    tokens_BT: Int[np.ndarray, "B T"]
    is_answer_BT: Bool[np.ndarray, "B T"]  # the loss counts the predictions of these tokens
    positions_BT: Int[np.ndarray, "B T"]  # in the token's own sample
    segments_BT: Int[np.ndarray, "B T"]  # which sample of the row a token belongs to, from 1; 0 is padding

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.segments_BT > 0).sum())


def training_batches(
    examples: Sequence[Example], *, length: int, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Batches without end: one epoch after the other of all examples, each in a new order.

    Args:
        examples: none longer than `length`.
        length: T, tokens of a row.
        batch_size: B, rows.
        seed: of the order.

    Returns:
        An iterator; `get_state` and `set_state` move it.
    """
    return iter(_packed(grain.MapDataset.source(examples).seed(seed).shuffle().repeat(), length, batch_size))


def held_out_batches(examples: Sequence[Example], *, length: int, batch_size: int) -> Iterator[Batch]:
    """All examples once, in order; the last batch is filled up with empty rows."""
    for batch in _packed(grain.MapDataset.source(examples), length, batch_size):
        missing = batch_size - len(batch.tokens_BT)
        yield Batch(*(np.pad(x, ((0, missing), (0, 0))) for x in batch))


def _packed(dataset: grain.MapDataset[Example], length: int, batch_size: int) -> grain.IterDataset[Batch]:
    rows = FirstFitPackIterDataset(
        dataset.map(_features).to_iter_dataset(IN_THIS_THREAD),
        length_struct={"tokens": length, "is_answer": length},
        num_packing_bins=PACKING_BINS,
    )
    return rows.batch(batch_size, drop_remainder=False).map(_batch)


def _features(example: Example) -> dict[str, np.ndarray]:
    return {"tokens": example.tokens, "is_answer": np.arange(len(example.tokens)) >= example.prompt_length}


def _batch(packed: dict[str, np.ndarray]) -> Batch:
    return Batch(packed["tokens"], packed["is_answer"], packed["tokens_positions"], packed["tokens_segment_ids"])
