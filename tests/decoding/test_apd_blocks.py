"""APD on models that are causal by blocks: with Qwen3 as verifier, and with the model itself under a causal mask."""

import dataclasses

import numpy as np
import pytest

from dllm_jax import decode, load_model
from dllm_jax.config import Config, to_config_dict
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.apd import Verifier
from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model
from tests.traces import GOLDENS, MASK

PROMPTS = [[1, 3, 70, 4, 9], [5, 6, 7]]


def loaded(name: str) -> Model:
    """A checkpoint whose mask is known."""
    model = load_model(GOLDENS / "checkpoints" / name)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, mask_id=MASK))


@pytest.fixture
def config() -> Config:
    values = Config()
    settings = dataclasses.replace(values.decode, policy="apd", gen_length=16, block_length=8, batch_size=2)
    return dataclasses.replace(values, decode=settings)


@pytest.mark.parametrize(("name", "verifier"), [("fdv2-tiny", "fdv2-tiny"), ("sdar-tiny", "qwen3-tiny")])
def test_rows_are_verified_as_they_are_alone(config: Config, name: str, verifier: str) -> None:
    model, causal = loaded(name), load_model(GOLDENS / "checkpoints" / verifier)
    result = decode(model, PROMPTS, to_config_dict(config), verifier=causal)
    assert (result.nfe_B < 16).all()  # some drafts were accepted
    assert (result.tokens_BG != MASK).all()
    for row, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], to_config_dict(config), verifier=causal)
        assert np.array_equal(alone.tokens_BG[0], result.tokens_BG[row])
        assert alone.nfe_B[0] == result.nfe_B[row]


def test_the_verifier_sees_no_token_behind_its_own(config: Config) -> None:
    model = loaded("fdv2-tiny")
    verifier = Verifier().accept(model)
    assert verifier.config.causal_block == 1
    decoder = Decoder(model, config, verifier=verifier)
    assert decoder.model.config.causal_block == 8


@pytest.mark.parametrize("name", ["sdar-tiny", "sdar-tiny-b"])
def test_models_that_predict_masks_only_are_refused_by_name(config: Config, name: str) -> None:
    expected = "verifier.path: expected a causal model, got the sdar model, which has no causal mode"
    with pytest.raises(UsageError, match=expected):
        decode(loaded("fdv2-tiny"), PROMPTS, to_config_dict(config), verifier=loaded(name))
