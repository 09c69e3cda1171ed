"""Which tokens end a text: from a model's files, its tokenizer and the setting."""

import dataclasses
import json
from pathlib import Path

import pytest

from dllm_jax.checkpoints import files
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.data import text
from dllm_jax.decoding.end_tokens import end_tokens, names
from dllm_jax.errors import UsageError
from dllm_jax.models.presets import PRESETS
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.settings import TokenizerSettings
from tests.checkpoints.folders import with_fields

TINY = ASSETS / "llada-tiny"  # EoS and padding 0, start 1, mask 2, end of turn 5; 512 rows
BARE = dataclasses.replace(PRESETS["llada_tiny"], other_end_ids=())
EOT, START = 5, 1
WORD = 300  # ordinary text


def load(folder: Path) -> text.TextCodec:
    codec = text.load(folder, TokenizerSettings())
    assert codec is not None
    return codec


def with_tokenizer(folder: Path, **fields: object) -> text.TextCodec:
    """The bundled tokenizer with other fields in its tokenizer_config.json."""
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load(folder)


def config_of(folder: Path, generation: object = None, **fields: object) -> TransformerConfig:
    """The configuration of the bundled model with other fields in its two files."""
    folder = with_fields(TINY, folder / "m", **fields)
    if generation is not None:
        (folder / files.GENERATION).write_text(json.dumps(generation))
    return files.read_config(folder)


def test_the_bundled_model() -> None:
    codec = load(TINY)
    ids = end_tokens(files.read_config(TINY), codec, setting=-1)
    assert ids == (0, EOT)
    assert names(ids, codec) == {0: "<|endoftext|>", EOT: "<|eot_id|>"}
    assert names(ids, None) == {0: "", EOT: ""}


@pytest.mark.parametrize(
    ("fields", "generation", "expected"),
    [
        ({"eot_token_id": None}, None, (0,)),
        ({"eos_token_id": [9, 0, 7]}, None, (9, 0, EOT, 7)),
        ({"eos_token_id": [0]}, {"eos_token_id": 8}, (0, EOT, 8)),
        ({"eot_token_id": [5, 6]}, {"eos_token_id": [8, 0]}, (0, EOT, 6, 8)),
        ({"eot_token_id": -1, "pad_token_id": -1}, {"eos_token_id": None, "pad_token_id": 4}, (0, 4)),
        ({"pad_token_id": 2, "eot_token_id": 2}, {"eos_token_id": 2, "pad_token_id": 2}, (0,)),  # the mask
        ({"eos_token_id": None}, {"eos_token_id": [6, 0]}, (6, 0, EOT)),
        ({"pad_token_id": 511}, {}, (0, EOT, 511)),
    ],
)
def test_both_files_count(
    fields: dict[str, object], generation: object, expected: tuple[int, ...], tmp_path: Path
) -> None:
    config = config_of(tmp_path, generation, **fields)
    assert config.end_ids == expected
    assert end_tokens(config, None, setting=-1) == expected


@pytest.mark.parametrize(
    ("fields", "generation", "told"),
    [
        ({"eos_token_id": [0, 512]}, None, "config.json: expected eos_token_id in the vocabulary of 512, got 512"),
        ({"eos_token_id": 0.5}, None, "config.json field eos_token_id: expected a token id or a list of them, got 0.5"),
        ({"eos_token_id": []}, None, "config.json field eos_token_id: expected a token id, got []"),
        ({"eos_token_id": 2}, None, "another eos_token_id than the mask_token_id, got 2 for both"),
        ({"eot_token_id": True}, None, "config.json field eot_token_id: expected a token id or a list of them"),
        ({"pad_token_id": 600}, None, "config.json: expected pad_token_id in the vocabulary of 512, got 600"),
        ({}, {"eos_token_id": [5, "x"]}, "generation_config.json field eos_token_id: expected a token id or a list"),
        ({}, {"pad_token_id": 600}, "generation_config.json: expected pad_token_id in the vocabulary of 512, got 600"),
        ({}, [5], "generation_config.json: expected a JSON object, got list"),
    ],
)
def test_ids_that_cannot_be_are_refused(
    fields: dict[str, object], generation: object, told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as failure:
        config_of(tmp_path, generation, **fields)
    assert told in str(failure.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0, EOT)),
        ({"pad_token": "<|startoftext|>"}, (0, START, EOT)),
        ({"pad_token": "<|mdm_mask|>"}, (0, EOT)),
        ({"eos_token": "<|end_header_id|>", "pad_token": None}, (0, 4, EOT)),
    ],
)
def test_the_tokenizer_counts(fields: dict[str, object], expected: tuple[int, ...], tmp_path: Path) -> None:
    assert end_tokens(BARE, with_tokenizer(tmp_path, **fields), setting=-1) == expected


def test_padding_that_is_ordinary_text_does_not_end_a_text() -> None:
    codec = load(TINY)
    padded = dataclasses.replace(BARE, pad_ids=(WORD, START))
    assert end_tokens(padded, None, setting=-1) == (0, START, WORD)
    assert end_tokens(padded, codec, setting=-1) == (0, START, EOT)
    named = dataclasses.replace(padded, other_end_ids=(WORD,))  # by eos_token_id or eot_token_id
    assert end_tokens(named, codec, setting=-1) == (0, START, EOT, WORD)


def test_the_setting_adds() -> None:
    assert end_tokens(PRESETS["llada_tiny"], None, setting=WORD) == (0, EOT, WORD)
    assert end_tokens(BARE, load(TINY), setting=WORD) == (0, EOT, WORD)
    assert end_tokens(BARE, None, setting=0) == (0,)


@pytest.mark.parametrize(("setting", "told"), [(-2, "-1 to 511"), (512, "-1 to 511"), (2, "got the mask 2")])
def test_a_setting_that_cannot_end_a_text(setting: int, told: str) -> None:
    with pytest.raises(UsageError, match=rf"model\.eot_token_id: expected .*{told}"):
        end_tokens(PRESETS["llada_tiny"], None, setting=setting)
