"""Held-out prompts: how many of them are answered right, at how many tokens per forward."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from dllm_jax.data.prompts import Prompt
from dllm_jax.data.samples import Sample
from dllm_jax.data.text import TextCodec
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.errors import UsageError
from dllm_jax.evals.scorers import SCORERS, scorer_for


class HeldOutPrompts:
    """Prompts to measure decoders on.

    Args:
        prompts: the prompts; answers of tasks that have a scorer are scored.
        tokens: of every prompt.
        codec: of the diffusion model.

    Raises:
        UsageError: a reference answer would not pass its own test.
    """

    def __init__(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], *, codec: TextCodec) -> None:
        self.prompts, self.tokens, self.codec = prompts, tokens, codec
        self.scorers = [_scorer(prompt) for prompt in prompts]

    @classmethod
    def of_samples(cls, samples: Sequence[Sample], *, codec: TextCodec, room: int) -> "HeldOutPrompts":
        """Those of the samples that have one.

        Args:
            samples: held-out ones.
            codec: of the diffusion model.
            room: tokens of the longest prompt that can be decoded.

        Raises:
            UsageError: a prompt is longer, or a reference answer would not pass its own test.
        """
        asked = [sample for sample in samples if sample.example.prompt_length]
        tokens = [sample.example.tokens[: sample.example.prompt_length].tolist() for sample in asked]
        longest = max(map(len, tokens), default=0)
        if longest > room and asked:
            raise UsageError(
                f"decode.gen_length: expected room for {longest} tokens, those of the longest held-out prompt, got one "
                f"that leaves {room}"
            )
        return cls([sample.prompt for sample in asked], tokens, codec=codec)

    def measured(self, result: DecodeResult) -> dict[str, float]:
        """Tokens per forward and, where there are scorers, accuracy in total and by task.

        Args:
            result: of all prompts.
        """
        correct = defaultdict(list)
        for row, (prompt, is_right) in enumerate(zip(self.prompts, self.scorers, strict=True)):
            if is_right:
                correct[prompt.task].append(is_right(self.codec.decode(result.text_ids(row))))
        return {
            "tokens_per_forward": int(result.num_tokens_B.sum()) / int(result.nfe_B.sum()),
            **({"accuracy": fmean(itertools.chain(*correct.values()))} if correct else {}),
            **{f"accuracy_{task}": fmean(answers) for task, answers in correct.items()},
        }


def _scorer(prompt: Prompt) -> Callable[[str], bool] | None:
    """What tells whether an answer is right, if the task is one we know."""
    known = prompt.task in SCORERS and prompt.answer is not None
    return scorer_for(prompt.task, prompt.answer) if known else None
