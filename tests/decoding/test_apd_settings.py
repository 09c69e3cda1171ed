"""APD from its settings: what is refused and how, the verifier's vocabulary, the shipped experiments."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import apd, apd_dream
from decode.run import main
from dllm_jax import api, cli, jobs, load_model
from dllm_jax.checkpoints.load import ASSETS
from dllm_jax.config import Config, from_config_dict, to_config_dict
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.vocabulary import check_shared
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.model import Model
from tests.traces import GOLDENS

CHECKPOINTS = GOLDENS / "checkpoints"
ROOT = Path(__file__).parents[2]


def config(**settings: object) -> Config:
    """The settings of configs/apd.py for a golden pair, with some changed: `decode__cache="dual"`."""
    values = apd.get_config()
    values.verifier.path = ""
    for name, value in {"decode__gen_length": 16, "apd__max_lookahead": 4, **settings}.items():
        section, field = name.split("__")
        values[section][field] = value
    return from_config_dict(values)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decode__cache": "dual"}, "decode.cache: expected one of none, window with decode.policy apd, got 'dual'"),
        (
            {"decode__policy": "threshold"},
            "decode.cache: expected one of none, prefix, dual, sliding, block with",
        ),
        ({"decode__cfg_scale": 1.0}, "decode.cfg_scale: expected 0 with decode.policy apd, got 1.0"),
        ({"decode__logits_eos_inf": True}, "decode.logits_eos_inf: expected False with decode.policy apd, got True"),
        ({"decode__confidence_eos_eot_inf": True}, "decode.confidence_eos_eot_inf: expected False with decode.policy"),
        ({"apd__mixture_weight": 1.5}, "apd.mixture_weight: expected 0 to 1, got 1.5"),
        ({"apd__kv_window": -1}, "apd.kv_window: expected at least 0, got -1"),
        ({"apd__target": "best"}, "apd.target: expected one of gumbel, argmax, got 'best'"),
        ({"apd__tokens_per_step": 5}, "apd.tokens_per_step: expected at most 4 (the tokens drafted), got 5"),
        (
            {"apd__tokens_per_step": 2, "verifier__path": "verifier-tiny"},
            "apd.tokens_per_step: expected 0 together with verifier.path, got both",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(**settings)
    assert told in str(caught.value)


def test_blocks_and_steps_are_ignored() -> None:
    assert config(decode__block_length=5, decode__steps=7).decode.gen_length == 16


def test_models_that_do_not_fit_are_refused() -> None:
    model, verifier = load_model(CHECKPOINTS / "llada-tiny"), load_model(CHECKPOINTS / "qwen2-tiny")
    elsewhere = load_model(CHECKPOINTS / "qwen2-tiny", mesh=make_mesh(data=2))
    for given, told in [
        (None, "verifier: expected a causal model"),
        (model, "verifier.path: expected a causal model, got the llada model"),
        (elsewhere, "verifier: expected it on the model's mesh"),
    ]:
        with pytest.raises(UsageError, match=told):
            Decoder(model, config(), verifier=given)
    with pytest.raises(UsageError, match="expected a masked diffusion model, got the qwen2 model"):
        Decoder(verifier, config(), verifier=verifier)
    with pytest.raises(UsageError, match="tokens_per_step: expected 0 together with a verifier"):
        Decoder(model, config(apd__tokens_per_step=2), verifier=verifier)
    short = dataclasses.replace(verifier, config=dataclasses.replace(verifier.config, max_length=20))
    with pytest.raises(UsageError, match="expected at most 4 tokens"):
        Decoder(model, config(), verifier=short).check([1] * 5)


def test_the_api_takes_the_verifier_behind_the_configuration() -> None:
    model, verifier = load_model(CHECKPOINTS / "llada-tiny"), load_model(CHECKPOINTS / "qwen2-tiny")
    result = api.decode(model, [[1, 2, 3], [4]], config(), verifier)
    assert result.tokens_BG.shape == (2, 16)
    assert result.nfe_B.max() <= 16
    np.testing.assert_array_equal(
        api.decode(model, [[1, 2, 3]], to_config_dict(config()), verifier).tokens_BG[0], result.tokens_BG[0]
    )
    with pytest.raises(UsageError, match="expected at most 320 tokens, the model's vocabulary, got 512"):
        api.decode(model, [[1]], config(), load_model("verifier-tiny"))


def sized(model: Model, vocab_size: int) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=vocab_size))


def test_vocabularies_are_compared_by_their_tokens() -> None:
    model = load_model(CHECKPOINTS / "qwen2-tiny")
    check = functools.partial(check_shared, field="verifier.path", advice="train one")
    tokens = {"a": 0, "b": 1, "c": 2}
    for theirs in (tokens, {"a": 0, "b": 1}, tokens | {"d": 3}):
        check(sized(model, 8), sized(model, 9), model_tokens=tokens, tokens=theirs)
    with pytest.raises(UsageError) as caught:
        check(model, model, model_tokens=tokens, tokens={"a": 0, "c": 1, "b": 2})
    assert "expected the tokens of model.path, got 'c' for id 1, which is 'b' there" in str(caught.value)
    check(sized(model, 9), sized(model, 8), model_tokens=None, tokens=tokens)
    with pytest.raises(UsageError, match="expected at most 8 tokens"):
        check(sized(model, 8), sized(model, 9), model_tokens=tokens, tokens=None)


def test_a_verifier_over_other_tokens_is_refused_before_decoding(tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "verifier-tiny", tmp_path / "verifier")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = apd.get_config()
    values.verifier.path = str(folder)
    with pytest.raises(UsageError, match=r"verifier\.path: expected the tokens of model\.path, got .*train/verifier"):
        jobs.run(from_config_dict(values), command="decode.run")
    for path, told in [("", "a causal model for decode.policy apd"), ("nowhere", "a folder or one of")]:
        values.verifier.path = path
        with pytest.raises(UsageError, match=rf"verifier\.path: expected {told}"):
            jobs.run(from_config_dict(values), command="decode.run")


def test_the_bundled_experiment_answers(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--config.input.prompt=Copy the list: oak, fern, duck.", "--config.decode.batch_size=1"]
    code = cli.execute(
        main, [*argv, "--config.decode.gen_length=32"], description="", default_config=str(ROOT / "configs" / "apd.py")
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    row = json.loads(out)
    assert row["text"] == "oak, fern, duck."
    assert row["nfe"] <= 3
    assert "tokens per forward" in err
    assert "committed" in err


def test_the_papers_experiment() -> None:
    settings = from_config_dict(apd_dream.get_config())
    paper = (settings.apd.mixture_weight, settings.apd.kv_window, settings.apd.max_lookahead)
    assert paper == (0.7, 16, 100)
    assert (settings.decode.temperature, settings.decode.top_p) == (0.2, 0.95)
    assert (settings.apd.target, settings.apd.temper_noise) == ("gumbel", True)
