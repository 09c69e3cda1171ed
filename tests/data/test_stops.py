"""Texts are cut before stop strings, with the tokens that belong to them."""

import pytest

from dllm_jax.checkpoints.load import resolve
from dllm_jax.data import text
from dllm_jax.data.stop_strings import cut
from dllm_jax.settings import TokenizerSettings


@pytest.fixture(scope="module")
def codec():
    return text.load(resolve("llada-tiny"), TokenizerSettings())


@pytest.mark.parametrize(
    ("written", "stops", "kept"),
    [
        ("oak, fern. duck", (".",), "oak, fern"),
        ("oak, fern. duck", ("duck", "fern"), "oak, "),  # the first in the text
        ("oak, fern. duck", ("nothing",), None),
        ("oak, fern. duck", (), None),
        ("oak", ("oak",), ""),
        ("oak, fern. duck", ("er",), "oak, f"),  # inside a word, and maybe a token
        ("tea\n\nQuestion: red", ("\nQuestion:",), "tea\n"),
        ("größer ∑ als", (" ∑",), "größer"),
        ("größer ∑ als", ("∑",), "größer "),
    ],
)
def test_texts_end_before_the_first_stop_string(codec, written, stops, kept):
    tokens = codec.encode_answer(written)
    got = cut(codec, tokens, stops)
    if kept is None:
        assert got == (written, len(tokens), False)
        return
    assert (got.text, got.stopped) == (kept, True)
    shown = [codec.tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    assert got.num_tokens == next(count for count, begun in enumerate(shown) if begun.startswith(kept))


def test_special_tokens_can_stop_a_text_and_are_dropped_from_it(codec):
    begin, header = codec.tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|start_header_id|>"])
    oak, fern = codec.encode_answer("oak"), codec.encode_answer("fern")
    tokens = [begin, *oak, header, *fern]
    assert cut(codec, tokens, ()) == ("oakfern", len(tokens), False)
    assert cut(codec, tokens, ("<|start_header_id|>",)) == ("oak", 1 + len(oak), True)
    assert cut(codec, tokens, ("k<|start_header_id|>fern",)).text == "oa"
