"""A policy with networks of its own, which nothing outside of this file knows: one line in `RECIPES` is enough."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

import dllm_jax
from dllm_jax import jobs, load_model
from dllm_jax.config import Config, build, to_config_dict
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.base import Commit, Policy, View, best, full
from dllm_jax.decoding.policies.build import RECIPES, of_fields
from dllm_jax.decoding.policies.companions import Companion, LanguageModel
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise
from dllm_jax.errors import UsageError
from dllm_jax.identity import sources
from dllm_jax.models.model import Model
from dllm_jax.placement import Shapes
from dllm_jax.settings import POLICIES, POLICY_FITS, DecodeSettings, Fits, InputSettings, ModelSettings, OutputSettings
from dllm_jax.settings.base import Section, setting
from tests.traces import GOLDENS

CHECKPOINT = str(GOLDENS / "checkpoints" / "llada-tiny")
PROMPTS = [[5, 7, 11], [13, 17]]

# The policy's own file.


class Head(Companion):
    """How far every token is to be trusted: a file with an array [V]."""

    name = argument = "head"
    kind, told = np.ndarray, "an array with a number for every token"
    expected = "the head that decode.policy trusting needs"

    def place(self, config: Config) -> Path:
        return Path(self.path(config))

    def open(self, config: Config, mesh: Mesh) -> Array:
        return self.accept(np.load(self.place(config)))

    def accept(self, value: np.ndarray) -> Array:
        return jnp.asarray(value, jnp.float32)

    def check(self, network: Array, config: Config, *, model: Model) -> None:
        if network.shape != (model.config.vocab_size,):
            raise UsageError(f"head.path: expected {model.config.vocab_size} numbers, got {network.shape}")


@struct.dataclass
class Trusting(Policy):
    head: Float[Array, "V"]
    least: Float[Array, ""]

    def commit(self, policy_state: tuple[()], prediction: Prediction, view: View, noise: Noise) -> Commit:
        trust_BQ = prediction.confidence_BQ * self.head[prediction.token_BQ]
        mask_BQ = (view.open_BQ & (trust_BQ >= self.least)) | best(trust_BQ, view.open_BQ)
        return Commit(mask_BQ, prediction.token_BQ, full(view.open_BQ, mask_BQ), policy_state)


class Judge(LanguageModel):
    """A second language model."""

    name = argument = "judge"
    expected = "a judge"
    advice = "ask around"


# Its settings.


@dataclasses.dataclass(frozen=True)
class PathSettings(Section):
    path: str = setting("", "where it is")


@dataclasses.dataclass(frozen=True)
class TrustingSettings(Section):
    least: float = setting(0.5, "commit what is trusted this far", least=0)


@dataclasses.dataclass(frozen=True)
class WithTrusting(DecodeSettings):
    policy: str = setting("trusting", "which tokens are committed", choices=("trusting",))


@dataclasses.dataclass(frozen=True)
class TrustingConfig(Config):
    decode: WithTrusting = dataclasses.field(default_factory=WithTrusting)
    trusting: TrustingSettings = dataclasses.field(default_factory=TrustingSettings)
    head: PathSettings = dataclasses.field(default_factory=PathSettings)
    judge: PathSettings = dataclasses.field(default_factory=PathSettings)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line in build.py, and what it goes together with."""
    monkeypatch.setitem(RECIPES, "trusting", of_fields(Trusting, Head()))
    monkeypatch.setitem(POLICY_FITS, "trusting", Fits())


def config(**sections: Any) -> TrustingConfig:
    made = TrustingConfig(
        model=ModelSettings(path=CHECKPOINT),
        decode=WithTrusting(gen_length=16, block_length=8, batch_size=2),
        **sections,
    )
    return build(TrustingConfig, to_config_dict(made))


def test_every_policy_has_its_recipe() -> None:
    assert set(RECIPES) == {*POLICIES, "trusting"}


def test_a_network_of_ones_own_decides() -> None:
    model = load_model(CHECKPOINT)
    nothing, everything = np.zeros(model.config.vocab_size), np.full(model.config.vocab_size, 1e9)
    results = [Decoder(model, config(), head=Head().accept(head))(PROMPTS) for head in (nothing, everything)]
    assert [result.nfe_B.tolist() for result in results] == [[16, 16], [2, 2]]
    assert results[1].timing.compilations == 0  # its numbers are arguments of the program
    given = dllm_jax.decode(model, PROMPTS, config(), head=everything)
    np.testing.assert_array_equal(given.tokens_BG, results[1].tokens_BG)


def test_a_job_reads_it(tmp_path: Path) -> None:
    model, head, out = load_model(CHECKPOINT), tmp_path / "head.npy", tmp_path / "out.jsonl"
    np.save(head, np.arange(model.config.vocab_size) % 2 * 1e9)  # trusts every other token
    asked = tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
    settings = config(
        head=PathSettings(str(head)), input=InputSettings(path=str(asked)), output=OutputSettings(path=str(out))
    )
    rows = jobs.run(settings, command="decode.run").rows
    alone = dllm_jax.decode(model, PROMPTS, settings)  # opens the path as well
    assert [row["output_ids"] for row in rows] == alone.tokens_BG.tolist()
    assert 2 < alone.nfe_B.max() < 16

    identity = json.loads(Path(f"{out}.metrics.json").read_text())["identity"]
    assert "head.npy of head.path" in identity["files"]
    assert identity["head"] == {}  # its content counts instead of its path
    np.save(head, np.load(head) * 2)
    with pytest.raises(UsageError, match=r"head\.npy of head\.path"):
        jobs.run(settings, command="decode.run")
    with pytest.raises(UsageError, match=r"expected a place apart from head\.path"):
        jobs.run(dataclasses.replace(settings, output=OutputSettings(path=str(head))), command="decode.run")


def test_what_is_missing_or_wrong_is_told() -> None:
    model = load_model(CHECKPOINT)
    missing = "head.path: expected the head that decode.policy trusting needs, got none"
    for function in (
        lambda: jobs.run(config(input=InputSettings(prompt="oak")), command="decode.run"),
        lambda: dllm_jax.decode(model, PROMPTS, config()),
        lambda: Decoder(model, config()),
    ):
        with pytest.raises(UsageError) as caught:
            function()
        assert str(caught.value) == missing
    with pytest.raises(UsageError, match=r"head\.path: expected 320 numbers, got \(3,\)"):
        Decoder(model, config(), head=jnp.ones(3))
    with pytest.raises(UsageError, match=r"head: expected an array with a number for every token, got 'x' \(str\)"):
        dllm_jax.decode(model, PROMPTS, config(), head="x")
    for function in (Decoder, lambda *args, **given: dllm_jax.decode(args[0], PROMPTS, args[1], **given)):
        with pytest.raises(TypeError, match="got an unexpected keyword argument 'foot'"):
            function(model, config(), foot=jnp.ones(3))


def test_a_second_language_model_is_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "trusting", of_fields(Trusting, Judge()))
    model, small = load_model(CHECKPOINT), GOLDENS / "checkpoints" / "qwen2-tiny"
    settings = config(judge=PathSettings(str(small)))
    assert sources(settings)["judge.path"] == small
    assert Shapes.of(settings, platform="cpu").companions == {"judge": load_model(small).config}
    with pytest.raises(UsageError, match=r"judge\.path: expected a causal model, got the llada model"):
        Decoder(model, settings, judge=model)
    judge = Judge().open(settings, model.mesh)
    assert jax.tree.all(jax.tree.map(np.array_equal, judge.params, load_model(small).params))
    wide = dataclasses.replace(judge, config=dataclasses.replace(judge.config, vocab_size=321))
    told = r"judge\.path: expected at most 320 tokens, the model's vocabulary, got 321 \(ask around\)"
    with pytest.raises(UsageError, match=told):
        Judge().check_tokens(wide, model, model_tokens=None, tokens=None)
