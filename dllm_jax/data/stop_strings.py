"""Stop strings: where a text ends besides its end tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from dllm_jax.data.text import TextCodec

STOPPED = "stop"  # the finish_reason of a text that was cut


class Cut(NamedTuple):
    """A text up to the first stop string."""

    text: str  # without special tokens
    num_tokens: int  # that have a part in it
    stopped: bool  # there was a stop string


def cut(codec: TextCodec, tokens: Sequence[int], stops: Sequence[str]) -> Cut:
    """Cuts a text before the first stop string.

    Stop strings are looked for in the text with its special tokens, which are dropped afterwards: one may be the text
    of a special token, or hold one.

    Args:
        codec: the tokenizer.
        tokens: of the text, up to the token that ends it.
        stops: none of them empty.
    """

    def shown(count: int) -> str:
        return codec.tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)

    whole = shown(len(tokens))
    found = [place for stop in stops if (place := whole.find(stop)) >= 0]
    if not found:
        return Cut(codec.decode(tokens), len(tokens), False)
    place = min(found)
    low, high = 0, len(tokens)  # the tokens up to `low` end before the cut, those up to `high` behind it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(shown(middle)) > place else (middle, high)
    rest = whole[len(shown(low)) : place]  # of the token that the stop string begins in
    return Cut(codec.decode(tokens[:low]) + rest, low + bool(rest), True)
