"""Tokenizers of both layouts, chat templates, and the text of outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import text
from dllm_jax.data.prompts import Prompt
from dllm_jax.errors import UsageError
from dllm_jax.settings import TokenizerSettings

TINY = ASSETS / "llada-tiny"
EOS, MASK, START_HEADER, END_HEADER, EOT, UNUSED = 0, 2, 3, 4, 5, 511


def load(folder: Path = TINY, chat_template: str = "auto", special_text: str = "text") -> text.TextCodec:
    codec = text.load(folder, TokenizerSettings(chat_template=chat_template, special_text=special_text))
    assert codec is not None
    return codec


def prompt(**content: object) -> Prompt:
    return Prompt(index=0, line=1, id=0, **content)


@pytest.fixture
def without_template(tmp_path: Path) -> Path:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    return tmp_path


@pytest.fixture
def vocab_and_merges(tmp_path: Path) -> Path:
    """The bundled tokenizer in the layout of Dream, with code that must not run."""
    source = json.loads((TINY / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(source["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in source["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(token["id"]): {k: token[k] for k in token if k != "id"} for token in source["added_tokens"]}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_dream.py").write_text("raise AssertionError('code of the folder was run')\n")
    return tmp_path


def test_auto_wraps_a_prompt_as_a_chat() -> None:
    tokens = load().encode(prompt(text="oak"))
    assert tokens[:2] == [1, START_HEADER]
    assert tokens.count(EOT) == 1
    assert tokens.count(END_HEADER) == 2
    assert tokens == load().encode(prompt(messages=({"role": "user", "content": "oak"},)))


def test_off_and_no_template_encode_the_bare_text(without_template: Path) -> None:
    bare = load(chat_template="off").encode(prompt(text="oak"))
    assert START_HEADER not in bare
    assert bare == load(without_template).encode(prompt(text="oak"))


def test_prompt_ids_stay_as_they_are() -> None:
    assert load().encode(prompt(prompt_ids=(7, 5, 0))) == [7, 5, 0]


def test_messages_need_a_template(without_template: Path) -> None:
    messages = prompt(messages=({"role": "user", "content": "oak"},))
    for codec in (load(without_template), load(chat_template="off")):
        with pytest.raises(UsageError, match=r"messages: expected a tokenizer with a chat template"):
            codec.encode(messages)


def test_messages_the_template_refuses(without_template: Path) -> None:
    (without_template / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"messages: .* roles must alternate"):
        load(without_template).encode(prompt(messages=({"role": "user", "content": "oak"},)))


def test_template_on_but_missing(without_template: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer.chat_template: expected a chat template"):
        load(without_template, chat_template="on")


def test_decoding_skips_special_and_unknown_tokens() -> None:
    codec = load()
    tokens = codec.tokenizer.encode("oak, fern.", add_special_tokens=False)
    assert codec.decode(np.array([MASK, *tokens, UNUSED, EOT], np.int32)) == "oak, fern."
    assert codec.decode([]) == ""


def test_vocab_and_merges_without_running_code(vocab_and_merges: Path) -> None:
    codec = load(vocab_and_merges)
    words = prompt(text="Copy the list: rice, lion.<|eot_id|>")
    assert codec.encode(words)[-1] != EOT
    assert load(vocab_and_merges, special_text="allow").encode(words)[-1] == EOT
    assert codec.vocab_size == 506


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert text.load(tmp_path, TokenizerSettings()) is None


def test_broken_tokenizer(without_template: Path) -> None:
    (without_template / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=f"tokenizer.path: expected a readable tokenizer in {without_template}"):
        load(without_template)


def test_tokenizer_larger_than_the_model() -> None:
    text.check_vocabulary(load(), 506)
    with pytest.raises(UsageError, match=r"tokenizer.path: expected at most 505 entries .* got 506"):
        text.check_vocabulary(load(), 505)
