"""What a verifier learns from and is measured on: the settings' samples, encoded."""

from collections.abc import Sequence

import rich.progress

from dllm_jax.data import samples, tasks
from dllm_jax.data.prompts import BadLines, Prompt
from dllm_jax.data.rows import Row
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.progress import for_people
from dllm_jax.training.verifier.config import DataSettings
from dllm_jax.training.verifier.distill import answer_tokens

HELD_OUT_SHARE = 10  # at most every tenth line of data.path is held out


class Corpus:
    """The prompts that the settings name, and those held out of a file of their own; `encode` makes samples of them.

    Args:
        data: the settings.
        seed: of the draws of the built-in tasks.

    Raises:
        UsageError: a file cannot be read, or a line is bad and data.on_error is fail.
    """

    def __init__(self, data: DataSettings, *, seed: int) -> None:
        self._data = data
        self._bad = BadLines(data.path or samples.BUILT_IN, data.on_error)
        if data.path:
            self.prompts = samples.read(data.path, self._bad, field="data.path", answers=not data.distill_path)
        else:
            self.prompts = samples.built_in(data.samples, seed=seed)
        separate = data.eval_path or ("" if data.path else str(tasks.HELD_OUT))
        self._bad_held_out = BadLines(separate, "fail")
        self.held_out: list[Prompt] = []
        if separate:
            held_out = samples.read(separate, self._bad_held_out, field="data.eval_path", answers=True)
            self.held_out = samples.spread(held_out, data.eval_samples)

    def encode(
        self, codec: TextCodec, *, answers: Sequence[Row] | None, end_id: int
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples to learn from and held-out samples; no prompt is in both.

        Args:
            codec: of the diffusion model.
            answers: its own answers, one for every prompt, to learn instead of those that came with the prompts.
            end_id: what ends an answer that came with a prompt.

        Raises:
            UsageError: a sample is too long, or there are none.
        """
        own = [None] * len(self.prompts) if answers is None else [answer_tokens(row) for row in answers]
        learnt = self._encode(self.prompts, own, bad=self._bad, codec=codec, end_id=end_id)
        self._bad.report(good=len(learnt))
        held_out = self._encode(
            self.held_out, [None] * len(self.held_out), bad=self._bad_held_out, codec=codec, end_id=end_id
        ) or samples.spread(learnt, min(self._data.eval_samples, max(1, len(learnt) // HELD_OUT_SHARE)))
        training = samples.without(learnt, held_out)
        if not training:
            raise UsageError(f"{self._bad.source}: expected samples to learn from besides the held-out ones, got none")
        return training, held_out

    def _encode(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[list[int] | None],
        *,
        bad: BadLines,
        codec: TextCodec,
        end_id: int,
    ) -> list[Sample]:
        encoded = []
        pairs = zip(prompts, answers, strict=True)
        for prompt, answer in rich.progress.track(pairs, "encoding", total=len(prompts), **for_people()):
            with bad.line(prompt.line):
                encoded.append(samples.encode(prompt, codec, answer=answer, end_id=end_id, length=self._data.length))
        return encoded
