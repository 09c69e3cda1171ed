"""Keeps the text of special tokens that stands in a message apart from the special tokens of the chat template."""

import functools
import re
import secrets

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase


class SpecialText:
    """Tokens of a rendered chat in which messages are nothing but text, whatever they spell.

    `hide` puts stand-ins into the messages before the template sees them; `encode` puts the text back, as text, while
    the special tokens that the template wrote become what they are. Messages without the text of a special token are
    encoded as ever.

    Args:
        tokenizer: a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special and t.content}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._secret = secrets.token_hex(8)  # so that no message can spell a stand-in
        self._hidden = re.compile(rf"{self._secret}-(\d+);")
        self._numbers = {content: number for number, content in enumerate(self._special)}

    def hide(self, text: str) -> str:
        """The text of a message with stand-ins for special tokens."""
        return self._pattern.sub(lambda match: f"{self._secret}-{self._numbers[match[0]]};", text)

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered chat, in which `hide` was applied to the messages; of itself if nothing was hidden."""
        if self._secret not in text:
            return self.tokenizer.encode(text, add_special_tokens=False)
        contents = list(self._numbers)
        text = self._pattern.sub(lambda match: self._mark(match[0]), text)
        text = self._hidden.sub(lambda match: contents[int(match[1])], text)
        backend, special_ids = self._plain
        tokens = backend.encode(text, add_special_tokens=False).ids
        return [special_ids.get(token, token) for token in tokens]

    def _mark(self, content: str) -> str:
        """What stands for the special token itself while the text of special tokens is text."""
        return f"{self._secret}+{self._numbers[content]};"

    @functools.cached_property
    def _plain(self) -> tuple[Tokenizer, dict[int | None, int]]:
        """The tokenizer with special tokens as text and `_mark`s as tokens; the special token's id of every mark."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        marks = {self._mark(content): token for content, token in self._special.items()}
        backend.add_tokens(
            [
                AddedToken(
                    mark,
                    special=False,
                    normalized=token.normalized,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for mark, token in marks.items()
            ]
        )
        ids = self.tokenizer.convert_tokens_to_ids([token.content for token in marks.values()])
        return backend, dict(zip(map(backend.token_to_id, marks), ids, strict=True))
