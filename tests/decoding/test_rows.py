"""A row's output never depends on its batch mates, its slot, the batch size, the padding or the mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax import load_model, mesh
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder, decode_all
from dllm_jax.decoding.state import DecodeResult
from dllm_jax.settings import DecodeSettings
from tests.traces import GOLDENS

LENGTHS = (3, 19, 8, 33, 1, 26, 14)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 290, size=length).tolist() for length in LENGTHS]


def config(temperature: float = 0.0, *, batch_size: int = 4, policy: str = "low_confidence") -> Config:
    return Config(
        decode=DecodeSettings(
            policy=policy, gen_length=32, block_length=16, steps=16, temperature=temperature, batch_size=batch_size
        )
    )


def assert_same_rows(got: DecodeResult, want: DecodeResult) -> None:
    np.testing.assert_array_equal(got.tokens_BG, want.tokens_BG)
    np.testing.assert_array_equal(got.commit_step_BG, want.commit_step_BG)
    np.testing.assert_array_equal(got.nfe_B, want.nfe_B)


@pytest.mark.parametrize(("policy", "temperature"), [("low_confidence", 1.0), ("random", 1.0), ("dico", 0.0)])
def test_rows_equal_their_single_runs(prompts: list[list[int]], policy: str, temperature: float) -> None:
    model = load_model(str(GOLDENS / "checkpoints" / "llada-tiny"))
    alone = Decoder(model, config(temperature, batch_size=1, policy=policy))
    single = [alone([prompt], rows=[row]) for row, prompt in enumerate(prompts)]
    for batch_size, multiple in [(4, 32), (7, 128)]:
        decoder = Decoder(model, config(temperature, batch_size=batch_size, policy=policy))
        decoder.length_multiple = multiple
        together = decode_all(decoder, prompts)
        for row, want in enumerate(single):
            np.testing.assert_array_equal(together.tokens_BG[row], want.tokens_BG[0])
            np.testing.assert_array_equal(together.commit_step_BG[row], want.commit_step_BG[0])
            assert together.nfe_B[row] == want.nfe_B[0]
            assert (together.log and together.log.row(row)) == (want.log and want.log.row(0))


def test_slots_of_a_batch_can_be_exchanged(prompts: list[list[int]]) -> None:
    decoder = Decoder(load_model(str(GOLDENS / "checkpoints" / "llada-tiny-gqa")), config(1.0))
    forward = decoder(prompts[:4], rows=[0, 1, 2, 3])
    backward = decoder(prompts[3::-1], rows=[3, 2, 1, 0])
    np.testing.assert_array_equal(forward.tokens_BG, backward.tokens_BG[::-1])


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (1, 1, 8), (2, 2, 2)]  # data, fsdp, tensor; 8 is more than the KV heads


@pytest.mark.parametrize(("shape", "split"), [*((shape, False) for shape in MESHES), ((2, 2, 2), True)], ids=str)
def test_tokens_do_not_depend_on_the_mesh(
    prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], split: bool
) -> None:
    data, fsdp, tensor = shape
    if split:  # as if the weights did not fit otherwise
        monkeypatch.setattr(mesh, "decoding_rules", lambda *_: mesh.DECODING_SPLIT)
    path = str(GOLDENS / "checkpoints" / "llada-tiny-gqa")
    one = Decoder(load_model(path), config(1.0, batch_size=8))(prompts)
    sharded = load_model(path, mesh=mesh.make_mesh(data=data, fsdp=fsdp, tensor=tensor))
    mlp = sharded.params["layers"][0]["mlp"]["gate_up"].get_value()
    assert mlp.addressable_shards[0].data.size == mlp.size // (fsdp * tensor if split else tensor)
    assert_same_rows(Decoder(sharded, config(1.0, batch_size=8))(prompts), one)


def test_a_second_batch_of_the_shape_compiles_nothing(prompts: list[list[int]]) -> None:
    model = load_model(str(GOLDENS / "checkpoints" / "llada-tiny"))
    jax.clear_caches()
    assert Decoder(model, config())(prompts[:4]).timing.compilations == 1
    assert Decoder(model, config())(prompts[2:4]).timing.compilations == 0
    warmer = dataclasses.replace(config(0.5).decode)
    assert Decoder(model, Config(decode=warmer))(prompts[:4]).timing.compilations == 1
    cooler = dataclasses.replace(warmer, temperature=0.2, steps=8, seed=3)
    assert Decoder(model, Config(decode=cooler))(prompts[:4]).timing.compilations == 0
