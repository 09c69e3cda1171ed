"""The prompts of a job with their tokens, read when they are decoded: a few numbers are held of every one."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dllm_jax.data.lazy import Lazy
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError


class Question(NamedTuple):
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: list[int]


class Questions:
    """Those of the prompts that can be decoded, in the order of the input.

    Args:
        asked: all prompts.
        codec: the tokenizer; None if there is none.
    """

    def __init__(self, asked: Sequence[Prompt], codec: TextCodec | None) -> None:
        self.asked, self.codec = asked, codec
        self._places, self._indices, self._lengths = array("I"), array("I"), array("I")

    def __len__(self) -> int:
        return len(self._places)

    def keep(self, place: int, prompt: Prompt, *, length: int) -> None:
        """Adds a prompt.

        Args:
            place: among all prompts.
            prompt: itself.
            length: of its tokens.
        """
        self._places.append(place)
        self._indices.append(prompt.index)
        self._lengths.append(length)

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt.

        Raises:
            UsageError: it cannot be encoded.
        """
        if self.codec:
            return self.codec.encode(prompt)
        if prompt.prompt_ids is None:
            raise UsageError(
                "expected prompt_ids, since the model's folder has no tokenizer (tokenizer.path), got text"
            )
        return list(prompt.prompt_ids)

    def prompts(self) -> Sequence[Prompt]:
        """The prompts."""
        return _Kept(self.asked, self._places)

    def without(self, part: range, done: np.ndarray) -> "Pending":
        """Those of a part that are not done yet.

        Args:
            part: places of the part.
            done: indices of prompts.
        """
        indices = np.array(self._indices[part.start : part.stop], np.uint32)
        places = part.start + np.flatnonzero(~np.isin(indices, done))
        return Pending(self, array("I", places.astype(np.uint32).tobytes()))

    def read(self, place: int) -> Question:
        """One of them."""
        prompt = self.asked[self._places[place]]
        return Question(prompt, self.encode(prompt))

    def lengths(self, places: Sequence[int]) -> Sequence[int]:
        """Tokens of some of them."""
        return array("I", (self._lengths[place] for place in places))

    def indices(self, places: Sequence[int]) -> Sequence[int]:
        """Indices in the input of some of them, on which random draws depend."""
        return array("I", (self._indices[place] for place in places))


class Pending(Lazy[list[int]]):
    """The tokens of questions, which are read when they are asked for and kept until they are taken.

    Args:
        questions: all of the job.
        places: of those that are meant here.
    """

    def __init__(self, questions: Questions, places: Sequence[int]) -> None:
        self._questions, self._places = questions, places
        self._begun: dict[int, Question] = {}
        self.lengths = questions.lengths(places)
        self.indices = questions.indices(places)

    def __len__(self) -> int:
        return len(self._places)

    def item(self, place: int) -> list[int]:
        """The tokens of a question, which is read once."""
        if place not in self._begun:
            self._begun[place] = self._questions.read(self._places[place])
        return self._begun[place].tokens

    def take(self, place: int) -> Question:
        """A question that is decoded."""
        return self._begun.pop(place)


class _Kept(Lazy[Prompt]):
    """Some of a sequence."""

    def __init__(self, asked: Sequence[Prompt], places: Sequence[int]) -> None:
        self._asked, self._places = asked, places

    def __len__(self) -> int:
        return len(self._places)

    def item(self, place: int) -> Prompt:
        """One of them."""
        return self._asked[self._places[place]]
