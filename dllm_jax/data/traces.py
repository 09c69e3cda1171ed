"""What an output line has, with `output.trace`, for a viewer of the decoding: text of all tokens, by their positions.

`dllm_jax/decoding/policies/traced.py` tells the steps, `dllm_jax/viewer/trace.py` reads a line back.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dllm_jax.config import Config
from dllm_jax.data.rows import Row

if TYPE_CHECKING:  # tokenizers take long to import: not for --help
    from dllm_jax.data.text import TextCodec

UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # stands for bytes of a character that other tokens complete
FIELDS = (
    "steps",
    "forwards",
    "prompt_ids",
    "prompt_text",
    "pieces",
    "piece_by_id",
    "special_ids",
    "confidence",
    "end",
    "lost",
    "block_length",
    "decoder",
)  # of a trace
LONGEST = 4  # tokens that a character may take, at least a byte each


def line(
    row: Row,
    *,
    prompt_ids: Sequence[int],
    confidence: Sequence[float],
    end: int,
    codec: "TextCodec | None",
    config: Config,
    block_length: int,
) -> Row:
    """The output line with all of its trace.

    Args:
        row: the output line with what the policy reports, `steps` and `held`.
        prompt_ids: tokens of the prompt.
        confidence: of every committed token, when it was committed.
        end: positions before the end that a stop rule or the decoder set.
        codec: the tokenizer; without one there is no text.
        config: all settings.
        block_length: positions of a block.

    Returns:
        The line with prompt_ids, prompt_text, pieces (the text of every generated token), piece_by_id (of tokens that
        were proposed or are not there any more), special_ids (those of all these tokens that are no text), confidence,
        end, lost (what was committed behind the end, as `held`), block_length and decoder (policy, cache, blocks, stop,
        and the policy's own settings).
    """
    output_ids: list[int] = row["output_ids"]
    steps = row.get("steps", [])
    lost = [what for what in row.get("held", []) if what[0] >= end]
    others = {token for step in steps for token in step["draft"]} | {token for _, token, _ in lost}
    others |= {token for step in steps for _, token, _ in step.get("retracted", [])}
    told = {name: value for name, value in row.items() if name != "held"}
    return told | {
        "prompt_ids": list(prompt_ids),
        "prompt_text": codec.tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False) if codec else None,
        "pieces": pieces(output_ids, codec) if codec else None,
        "piece_by_id": {str(i): codec.pieces([i])[0] for i in sorted(others)} if codec else {},
        "special_ids": sorted(others.union(output_ids) & codec.special_ids) if codec else [],
        "confidence": [round(float(c), 6) for c in confidence],
        "end": end,
        "lost": lost,
        "block_length": block_length,
        "decoder": _decoder(config),
    }


def without(row: Row) -> Row:
    """The output line without the fields of a trace, for a reader of the standard output."""
    return {name: value for name, value in row.items() if name not in FIELDS}


def pieces(tokens: Sequence[int], codec: "TextCodec") -> list[str]:
    """The text of every token, special tokens included; a character of several tokens stands at the first of them."""
    alone = codec.pieces(tokens)
    place = 0
    while place < len(alone):
        if UNREADABLE in alone[place]:
            for count in range(2, LONGEST + 1):
                together = codec.tokenizer.decode(tokens[place : place + count], clean_up_tokenization_spaces=False)
                if UNREADABLE not in together:
                    alone[place : place + count] = [together, *[""] * (count - 1)]
                    place += count - 1
                    break
        place += 1
    return alone


def _decoder(config: Config) -> dict[str, Any]:
    decode = config.decode
    own = getattr(config, decode.policy, None)
    chosen = {name: getattr(decode, name) for name in ("policy", "cache", "blocks", "stop")}
    return chosen | {"settings": dataclasses.asdict(own) if own else {}}
