"""The text of tokens in a trace."""

from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.config import Config
from dllm_jax.data import text, traces
from dllm_jax.settings import TokenizerSettings

CODEC = text.load(ASSETS / "llada-tiny", TokenizerSettings())


def test_a_character_of_several_tokens_stands_at_the_first() -> None:
    assert CODEC
    for content in ("oak, \u00e9t\u00e9: \u65e5\u672c \N{ROCKET}.", "\N{ROCKET}", "plain"):
        tokens = CODEC.encode_answer(content)
        told = traces.pieces(tokens, CODEC)
        assert len(told) == len(tokens)
        assert "".join(told) == CODEC.decode(tokens) == content
        assert ("" in told) == (not content.isascii())
    half = CODEC.encode_answer("\N{ROCKET}")[:2]
    assert set("".join(traces.pieces([*half, *CODEC.encode_answer("oak")], CODEC))) > {"o", traces.UNREADABLE}


def test_the_fields_of_a_trace() -> None:
    assert CODEC
    steps = [{"draft": [18, 5, 0]}, {"draft": [], "retracted": [[0, 38, 1]]}]
    row = {"output_ids": [17, 5, 0], "steps": steps, "held": [[0, 17, 1], [2, 76, 1]]}
    told = traces.line(
        row, prompt_ids=[1, 38], confidence=[0.5, 0.25, 0], end=2, codec=CODEC, config=Config(), block_length=3
    )
    assert set(told) | {"forwards"} == {*traces.FIELDS, "output_ids"}
    assert traces.without(told) == {"output_ids": [17, 5, 0]}
    assert told["lost"] == [[2, 76, 1]]
    assert told["special_ids"] == [0, 5]
    assert list(told["piece_by_id"]) == ["0", "5", "18", "38", "76"]
    assert told["prompt_text"].startswith("<|startoftext|>")
    assert (told["decoder"]["policy"], told["decoder"]["cache"]) == ("low_confidence", "auto")
    without = traces.line(
        row, prompt_ids=[1], confidence=[0.5, 0.25, 0], end=2, codec=None, config=Config(), block_length=3
    )
    assert (without["pieces"], without["prompt_text"], without["piece_by_id"]) == (None, None, {})
