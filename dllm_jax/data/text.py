"""Text to tokens and back, on the host only. Tokenizers are read from local folders; their code is never run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2TokenizerFast

from dllm_jax.data.prompts import Prompt
from dllm_jax.data.special_text import SpecialText
from dllm_jax.errors import UsageError
from dllm_jax.settings import TokenizerSettings


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """A tokenizer and how prompts become chats.

    Attributes:
        tokenizer: of the model.
        chat_template: tokenizer.chat_template: auto, on or off.
        special_text: tokenizer.special_text: text or allow.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    special_text: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt: a chat that awaits the answer, or the bare text.

        Raises:
            UsageError: messages without a chat template, or messages that the template refuses.
        """
        if prompt.prompt_ids is not None:
            return list(prompt.prompt_ids)
        template = self.tokenizer.chat_template is not None and self.chat_template != "off"
        if prompt.messages is not None and not template:
            raise UsageError(
                "messages: expected a tokenizer with a chat template, for a chat or a system message, and "
                "tokenizer.chat_template not off"
            )
        text = prompt.text or ""
        if not template:
            return self.encode_answer(text)
        return self.encode_chat(self.render(prompt.messages or [{"role": "user", "content": text}]))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A chat as text, up to where the answer begins, for `encode_chat`; a last message of the assistant goes on.

        Raises:
            UsageError: the template refuses the messages.
        """
        if self.special_text == "allow":
            return self._render(messages)
        hide = self._special.hide
        return self._render([{**message, "content": hide(message["content"])} for message in messages])

    def encode_chat(self, text: str) -> list[int]:
        """Tokens of a rendered chat, whose template has written all special tokens there are."""
        if self.special_text == "allow":
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self._special.encode(text)

    def encode_answer(self, answer: str) -> list[int]:
        """Tokens of a text by itself, such as one that answers an encoded prompt, without a token that ends it."""
        if self.special_text == "allow":
            return self.tokenizer.encode(answer, add_special_tokens=False)
        return self._special.encode(self._special.hide(answer))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, tokens: Sequence[int] | np.ndarray) -> list[str]:
        """The text of every token by itself, special tokens included."""
        return [self.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens]

    @property
    def special_ids(self) -> set[int]:
        """The tokens that `decode` leaves out."""
        added = self.tokenizer.added_tokens_decoder
        return {token for token, each in added.items() if each.special} | set(self.tokenizer.all_special_ids)

    @functools.cached_property
    def _special(self) -> SpecialText:
        return SpecialText(self.tokenizer)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the template makes of messages."""
        goes_on = messages[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
            )
        except (jinja2.TemplateError, ValueError) as error:  # the latter: the last message is not in the chat
            raise UsageError(f"messages: expected what the chat template can render, got: {error}") from None
        for message in messages:
            if message["role"] == "system" and message["content"].strip() not in text:
                raise UsageError("messages: expected a chat template with system messages, got one that drops them")
        return text


def load(folder: Path, settings: TokenizerSettings) -> TextCodec | None:
    """The tokenizer of a folder: tokenizer.json, or vocab.json and merges.txt as Qwen2 and Dream have them.

    Args:
        folder: a model's or a tokenizer's.
        settings: the chat template to use.

    Returns:
        None if the folder has no tokenizer.

    Raises:
        UsageError: the tokenizer cannot be read, or lacks the chat template asked for.
    """
    if (folder / "tokenizer.json").is_file():
        family = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        family = Qwen2TokenizerFast
    else:
        return None
    try:
        tokenizer = family.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"tokenizer.path: expected a readable tokenizer in {folder}, got: {error}") from None
    if settings.chat_template == "on" and tokenizer.chat_template is None:
        raise UsageError(f"tokenizer.chat_template: expected a chat template in {folder} for 'on', got none")
    return TextCodec(tokenizer, settings.chat_template, settings.special_text)


def check_vocabulary(codec: TextCodec, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model does not have.

    Raises:
        UsageError: the tokenizer belongs to another model.
    """
    if codec.vocab_size > vocab_size:
        raise UsageError(
            f"tokenizer.path: expected at most {vocab_size} entries (the model's vocabulary), got {codec.vocab_size}"
        )
