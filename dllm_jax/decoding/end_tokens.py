"""The tokens that end a text: one set for counts, texts, stop rules and policies."""

import dataclasses
from collections.abc import Sequence

from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.models.transformer import TransformerConfig

TURN_NAMES = ("<|eot_id|>", "<|im_end|>")
NAMES = ("<|endoftext|>", *TURN_NAMES, "<|dlm_pad|>")  # in any tokenizer they end a text or a turn


def end_tokens(config: TransformerConfig, codec: TextCodec | None, *, setting: int) -> tuple[int, ...]:
    """Every token that ends a text: EoS first, which fills the output behind an end, then the others by id.

    They come from config.json and generation_config.json (`TransformerConfig.end_ids`), from the tokenizer (its EoS,
    its padding and the tokens of `NAMES`) and from the setting. [MASK] is never one of them, nor is a pad_token_id that
    the tokenizer knows as ordinary text.

    Args:
        config: of the model.
        codec: the tokenizer, if there is one.
        setting: model.eot_token_id, a further token; -1 for none.

    Raises:
        UsageError: the setting is no token of the model, or is its mask.
    """
    if not -1 <= setting < config.vocab_size:
        raise UsageError(f"model.eot_token_id: expected -1 to {config.vocab_size - 1}, got {setting}")
    if setting == config.mask_id:
        raise UsageError(f"model.eot_token_id: expected a token that can end a turn, got the mask {setting}")
    found = [] if setting < 0 else [setting]
    pads = config.pad_ids
    if codec:
        vocabulary, special = codec.tokenizer.get_vocab(), _special_ids(codec)
        found += [vocabulary[name] for name in NAMES if name in vocabulary]
        found += [i for i in (codec.tokenizer.eos_token_id, codec.tokenizer.pad_token_id) if i is not None]
        pads = tuple(i for i in pads if i in special or i not in vocabulary.values())
    others = tuple(i for i in found if i < config.vocab_size)
    return dataclasses.replace(config, other_end_ids=config.other_end_ids + others, pad_ids=pads).end_ids


def end_of_turn(end_ids: Sequence[int], codec: TextCodec | None, *, setting: int) -> int:
    """The one of `end_tokens` with which an answer to learn from ends.

    Args:
        end_ids: from `end_tokens`.
        codec: the tokenizer, if there is one.
        setting: model.eot_token_id, which comes first; -1 for none.
    """
    turns = [setting] if setting >= 0 else [i for i, name in names(end_ids, codec).items() if name in TURN_NAMES]
    return [*turns, *end_ids[1:], end_ids[0]][0]


def names(end_ids: Sequence[int], codec: TextCodec | None) -> dict[int, str]:
    """The text of every end token by id, to be shown; "" where the tokenizer has none."""
    return dict(zip(end_ids, codec.pieces(end_ids) if codec else [""] * len(end_ids), strict=True))


def _special_ids(codec: TextCodec) -> set[int]:
    added = {i for i, token in codec.tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(codec.tokenizer.all_special_ids)
