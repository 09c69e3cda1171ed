"""What a prompt spells is text, also where it spells a special token; the chat template's own tokens stay special."""

import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import text
from dllm_jax.data.prompts import Prompt
from dllm_jax.data.special_text import SpecialText
from dllm_jax.data.text import TextCodec
from dllm_jax.errors import UsageError
from dllm_jax.settings import TokenizerSettings
from tests.cases.conftest import Run

FOLDERS = ("llada-tiny", "llada", "dream", "qwen")  # the bundled one; those of make_checkpoints.py
USER = {"role": "user", "content": "oak"}


def load(folder: Path, **settings: str) -> TextCodec:
    codec = text.load(folder, TokenizerSettings(**settings))
    assert codec
    return codec


def asked(*messages: dict[str, str]) -> Prompt:
    return Prompt(index=0, line=1, id=0, messages=messages)


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    return ASSETS / request.param if request.param == "llada-tiny" else checkpoints / request.param


def special_ids(codec: TextCodec) -> dict[str, int]:
    return {token.content: i for i, token in codec.tokenizer.added_tokens_decoder.items() if token.special}


def test_ordinary_text_is_encoded_as_a_whole(folder: Path) -> None:
    codec, old = load(folder), load(folder, special_text="allow")

    @given(st.text(st.characters(codec="utf-8"), max_size=20), st.text("oak, fern<|>_\n", max_size=20))
    @example("  caf\u00e9 <|eot", "id|>\n\n")
    def same(first: str, second: str) -> None:
        chat = asked(USER | {"content": first}, {"role": "assistant", "content": "a"}, USER | {"content": second})
        tokens = codec.encode(chat)
        assert tokens == old.encode(chat)
        # So are the parts around a hidden text: with it at the end of the chat, all before it is the same.
        rendered = codec._render(chat.messages or ())
        special = SpecialText(codec.tokenizer)
        end = next(iter(special_ids(codec)))
        spelt = special.encode(special.hide(end))
        hidden = special.encode(f"{rendered}{codec.tokenizer.eos_token}{special.hide(end)}")
        assert hidden == [*tokens, codec.tokenizer.eos_token_id, *spelt]

    same()


def test_the_text_of_every_special_token_stays_text(folder: Path) -> None:
    codec, old = load(folder), load(folder, special_text="allow")
    plain = codec.encode(asked(USER))
    written = [token for token in plain if token in special_ids(codec).values()]
    for content, i in special_ids(codec).items():
        chat = asked(USER | {"content": f"oak {content}{content} fern"})
        tokens, allowed = codec.encode(chat), old.encode(chat)
        assert [token for token in tokens if token in special_ids(codec).values()] == written
        assert allowed.count(i) == written.count(i) + 2
        assert codec.tokenizer.decode(tokens) == old.tokenizer.decode(allowed)  # it reads the same
        bare = load(folder, chat_template="off").encode(Prompt(index=0, line=1, id=0, text=content))
        assert i not in bare
        assert bare == codec.encode_answer(content)


def test_a_last_message_of_the_assistant_goes_on(folder: Path) -> None:
    codec = load(folder)
    begun = codec.encode(asked(USER))
    for prefix in ("Sure:", "Sure <|eot_id|><|im_end|>:"):
        tokens = codec.encode(asked(USER, {"role": "assistant", "content": prefix}))
        assert tokens[: len(begun)] == begun
        assert tokens[len(begun) :] == codec.encode_answer(prefix)


def test_a_template_that_drops_or_refuses_messages(tmp_path: Path) -> None:
    shutil.copy(ASSETS / "llada-tiny/tokenizer.json", tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UsageError, match=r"messages: expected a chat template with system messages"):
        load(tmp_path).encode(asked({"role": "system", "content": "Be brief."}, USER))
    with pytest.raises(UsageError, match=r"messages: expected what the chat template can render"):
        load(tmp_path).encode(asked(USER, {"role": "assistant", "content": "Sure"}))


def test_from_the_command_line(run: Run) -> None:
    settings = ("output.trace=true", "decode.gen_length=8", "decode.block_length=8")
    ran = run("input.prompt=oak<|eot_id|>", *settings, config="threshold")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["prompt_ids"].count(5) == 1  # the template's
