"""Settings from a ConfigDict: names, types, values and their combinations."""

import dataclasses

import pytest

from configs import base, vanilla
from dllm_jax.config import Config, build, from_config_dict, to_config_dict, validate
from dllm_jax.errors import UsageError
from dllm_jax.settings import DecodeSettings, block_schedule
from dllm_jax.training.filter.config import FilterTraining


def with_value(name: str, value: object) -> Config:
    values = to_config_dict(Config())
    section, field = name.split(".")
    with values[section].ignore_type():
        values[section][field] = value
    return from_config_dict(values)


def test_defaults_survive_the_round_trip() -> None:
    assert from_config_dict(to_config_dict(Config())) == Config()
    assert from_config_dict(base.get_config()) == Config()


def test_vanilla_is_the_default_sampler() -> None:
    decode = from_config_dict(vanilla.get_config()).decode
    assert (decode.policy, decode.cache, decode.stop) == ("low_confidence", "auto", "none")
    assert (decode.gen_length, decode.block_length) == (96, 32)


def test_tilde_is_expanded_in_the_paths_of_every_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    values = to_config_dict(FilterTraining())
    for name in ("path", "eval_path", "records_path"):
        values.data[name] = f"~/{name}"
    data = build(FilterTraining, values).data
    assert (data.path, data.eval_path, data.records_path) == tuple(
        f"/home/someone/{name}" for name in ("path", "eval_path", "records_path")
    )


def test_every_setting_has_help() -> None:
    for section in dataclasses.fields(Config):
        settings = getattr(Config(), section.name)
        assert type(settings).__doc__
        assert all(field.metadata["help"] for field in dataclasses.fields(settings))


def test_zeros_of_the_schedule_are_filled_in() -> None:
    assert block_schedule(DecodeSettings(gen_length=64, block_length=0, steps=0)) == (64, 64)
    assert block_schedule(DecodeSettings(gen_length=64, block_length=16, steps=8)) == (16, 8)


def test_an_int_is_a_fine_float() -> None:
    assert isinstance(with_value("decode.temperature", 1).decode.temperature, float)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("decode.polcy", "x", "decode.polcy"),
        ("decode.gen_length", "96", "decode.gen_length: expected int, got '96'"),
        ("decode.gen_length", True, "decode.gen_length: expected int, got True"),
        ("decode.gen_length", None, "decode.gen_length: expected int, got None"),
        ("decode.temperature", "hot", "decode.temperature: expected float, got 'hot'"),
        ("decode.temperature", float("nan"), "decode.temperature: expected a finite number, got nan"),
        ("decode.temperature", -1.0, "decode.temperature: expected at least 0, got -1.0"),
        ("decode.cfg_scale", -0.5, "decode.cfg_scale: expected at least 0"),
        ("model.verify", 1, "model.verify: expected bool, got 1"),
        ("model.dtype", "int8", "model.dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        ("decode.policy", "best", "decode.policy: expected one of"),
        ("input.on_error", "warn", "input.on_error: expected one of fail, skip, got 'warn'"),
        ("mesh.tensor", -1, "mesh.tensor: expected at least 0, got -1"),
        ("decode.gen_length", 0, "decode.gen_length: expected at least 1, got 0"),
        ("decode.batch_size", 0, "decode.batch_size: expected at least 1, got 0"),
        ("decode.bucket_waste", -0.1, "decode.bucket_waste: expected at least 0, got -0.1"),
        ("decode.block_length", 36, "decode.block_length: expected a divisor of decode.gen_length 96, got 36"),
        ("decode.steps", 64, "decode.steps: expected a multiple of the number of blocks 3, got 64"),
        (
            "decode.stop",
            "eos",
            "decode.stop: expected one of none, eot, settled, eot+settled, block_eos, early_eos, got 'eos'",
        ),
        ("decode.cache", "both", "expected one of auto, none, prefix, dual, window, sliding, block, got 'both'"),
        ("decode.sub_block_length", -1, "decode.sub_block_length: expected at least 0, got -1"),
        ("decode.top_k", -1, "decode.top_k: expected at least 0, got -1"),
        ("edit.min_tokens", 0, "edit.min_tokens: expected at least 1, got 0"),
        ("learn2pd.threshold", 1.5, "learn2pd.threshold: expected 0 to 1, got 1.5"),
        ("threshold.decay", 1.5, "threshold.decay: expected 0 to 1, got 1.5"),
        ("klass.history", 0, "klass.history: expected at least 1, got 0"),
        ("dawn.edge", 0.0, "dawn.edge: expected above 0, got 0.0"),
        ("r2.stable_by", "first", "r2.stable_by: expected one of last, ave, max, got 'first'"),
        ("decode.top_p", 1.5, "decode.top_p: expected above 0 and at most 1, got 1.5"),
        ("decode.eps", 1.0, "decode.eps: expected above 0 and below 1, got 1.0"),
        ("eot.min_confidence", -0.1, "eot.min_confidence: expected 0 to 1, got -0.1"),
        ("bench.eos_logit", 5.0, "bench.eos_logit: expected 0 without model.preset or with model.quantize, got 5.0"),
    ],
)
def test_bad_setting_names_field_expected_and_got(name: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_value(name, value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        ({"policy": "apd", "cache": "window", "stop": "eot"}, "decode.stop: expected none with decode.policy apd"),
        ({"stop": "eot", "logits_eos_inf": True}, "decode.logits_eos_inf: expected False with decode.stop eot"),
        (
            {"stop": "eot", "confidence_eos_eot_inf": True},
            "decode.confidence_eos_eot_inf: expected False with decode.s",
        ),
        ({"policy": "wino", "cache": "dual"}, "decode.cache: expected none with decode.policy wino, got 'dual'"),
        ({"policy": "dico", "blocks": "growing"}, "decode.blocks: expected aligned with decode.policy dico, got 'g"),
        (
            {"blocks": "sliding", "cache": "dual"},
            "decode.cache: expected one of none, sliding with decode.blocks sliding, got 'dual'",
        ),
        (
            {"cache": "sliding"},
            "decode.cache: expected one of none, prefix, dual, window, block with decode.blocks aligned, got 'sliding'",
        ),
        ({"blocks": "adaptive"}, "adaptive.delimiters: expected token ids like 198,13, got ''"),
        (
            {"blocks": "sliding", "cache": "block"},
            "decode.cache: expected one of none, sliding with decode.blocks sliding, got 'block'",
        ),
        (
            {"policy": "edit", "cache": "dual"},
            "decode.cache: expected one of none, block with decode.policy edit, got 'dual'",
        ),
        (
            {"sub_block_cache": True},
            "decode.sub_block_cache: expected False without decode.sub_block_length and decode.cache block, got True",
        ),
        (
            {"sub_block_cache": True, "sub_block_length": 8, "cache": "none"},
            "decode.sub_block_cache: expected False without decode.sub_block_length and decode.cache block, got True",
        ),
        (
            {"blocks": "adaptive", "cache": "dual", "compat": "reference"},
            "decode.compat: expected none with decode.blocks adaptive and decode.cache dual, got 'reference'",
        ),
        ({"stop": "eot", "cache": "dual", "compat": "reference"}, "decode.compat: expected none with decode.stop eot"),
        (
            {"policy": "learn2pd", "cache": "dual", "compat": "reference"},
            "decode.compat: expected none with decode.policy learn2pd and decode.cache dual, got 'reference'",
        ),
    ],
)
def test_refused_combinations(decode: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Config(decode=DecodeSettings(**decode)))
    assert expected in str(caught.value)


def test_one_prompt_and_a_file_exclude_each_other() -> None:
    values = to_config_dict(Config())
    values.input.path, values.input.prompt = "in.jsonl", "hi"
    with pytest.raises(UsageError, match=r"input\.prompt: expected none together with input\.path"):
        from_config_dict(values)
