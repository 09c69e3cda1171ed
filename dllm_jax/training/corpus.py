"""What a model learns from and is measured on: the settings' samples, encoded."""

from collections.abc import Sequence

import rich.progress

from dllm_jax.data import samples, tasks
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.rows import Row
from dllm_jax.data.samples import OwnAnswer, Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.progress import for_people
from dllm_jax.training.distill import own_answer
from dllm_jax.training.settings import CorpusSettings

SHARES = {"equal": tasks.EQUAL_SHARES, "bundled": tasks.TRAINING_SHARES, "lists": tasks.LIST_SHARES}
HELD_OUT_SHARE = 10  # at most every tenth line of data.path is held out


class Corpus:
    """The prompts that the settings name, and those held out of a file of their own; `encode` makes samples of them.

    Args:
        data: the settings.
        seed: of the draws of the built-in tasks.

    Raises:
        UsageError: a file cannot be read, or a line is bad and data.on_error is fail.
    """

    def __init__(self, data: CorpusSettings, *, seed: int) -> None:
        self._data = data
        self._bad = BadLines(data.path or samples.BUILT_IN, data.on_error)
        if data.path:
            self.prompts = samples.read(data.path, self._bad, field="data.path", answers=not data.distill_path)
        else:
            self.prompts = samples.built_in(data.samples, seed=seed, shares=SHARES[data.shares], longer=data.longer)
        separate = data.eval_path or ("" if data.path else str(tasks.HELD_OUT))
        self._bad_held_out = BadLines(separate, "fail")
        self.held_out: list[Prompt] = []
        if separate:
            held_out = samples.read(separate, self._bad_held_out, field="data.eval_path", answers=True)
            if not (data.path or data.eval_path):  # of the built-in tasks, those that are drawn
                held_out = [prompt for prompt in held_out if SHARES[data.shares][prompt.task]]
            self.held_out = samples.spread(held_out, data.eval_samples)

    def encode(
        self, codec: TextCodec, *, answers: Sequence[Row | None] | None, end_id: int
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples to learn from and held-out samples; no prompt is in both.

        Args:
            codec: of the diffusion model.
            answers: its own answers, one for every prompt, to learn instead of those that came with the prompts; None
                leaves the prompt out.
            end_id: what ends an answer that came with a prompt.

        Raises:
            UsageError: a sample is too long, or there are none.
        """
        pairs: list[tuple[Prompt, OwnAnswer | None]] = (
            [(prompt, None) for prompt in self.prompts]
            if answers is None
            else [
                (prompt, own_answer(row)) for prompt, row in zip(self.prompts, answers, strict=True) if row is not None
            ]
        )
        learnt = self._encode(pairs, bad=self._bad, codec=codec, end_id=end_id)
        self._bad.report(good=len(learnt))
        held_out = self._encode(
            [(prompt, None) for prompt in self.held_out], bad=self._bad_held_out, codec=codec, end_id=end_id
        ) or samples.spread(learnt, min(self._data.eval_samples, max(1, len(learnt) // HELD_OUT_SHARE)))
        training = samples.without(learnt, held_out)
        if not training:
            raise UsageError(f"{self._bad.source}: expected samples to learn from besides the held-out ones, got none")
        return training, held_out

    def _encode(
        self,
        pairs: Sequence[tuple[Prompt, OwnAnswer | None]],
        *,
        bad: BadLines,
        codec: TextCodec,
        end_id: int,
    ) -> list[Sample]:
        encoded = []
        for prompt, answer in rich.progress.track(pairs, "encoding", **for_people()):
            with bad.line(prompt.line):
                encoded.append(samples.encode(prompt, codec, answer=answer, end_id=end_id, length=self._data.length))
        return encoded


class Texts:
    """A `Corpus` of bare texts, without prompts: every piece of a text is a sample.

    Args:
        path: JSONL file of them (data.texts).
        data: the other settings.
    """

    prompts: Sequence[Prompt] = ()
    held_out: Sequence[Prompt] = ()

    def __init__(self, path: str, data: CorpusSettings) -> None:
        self._path, self._data = path, data

    def encode(
        self, codec: TextCodec, *, answers: Sequence[Row | None] | None, end_id: int
    ) -> tuple[list[Sample], list[Sample]]:
        """Pieces to learn from and held-out pieces, the latter at even distances; see `Corpus.encode`.

        Args:
            codec: of the diffusion model.
            answers: none.
            end_id: what ends a text.

        Raises:
            UsageError: the file cannot be read, a line is bad, or there is only one piece.
        """
        assert answers is None, "texts have no prompts"
        bad = BadLines(self._path, self._data.on_error)
        pieces = [
            Sample(Prompt(index=place, line=place + 1, id=place, text=""), example)
            for place, example in enumerate(
                samples.read_texts(self._path, bad, codec, field="data.texts", end_id=end_id, length=self._data.length)
            )
        ]
        if len(pieces) < 2:
            raise UsageError(f"{self._path}: expected samples to learn from besides the held-out ones, got none")
        count = min(self._data.eval_samples, max(1, len(pieces) // HELD_OUT_SHARE))
        held_out = samples.spread(pieces, count)
        reserved = {sample.prompt.index for sample in held_out}
        return [piece for piece in pieces if piece.prompt.index not in reserved], held_out
