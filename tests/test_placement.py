"""Which mesh a decode gets: arithmetic on shapes alone, for machines that are not here."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dllm_jax import placement
from dllm_jax.config import Config
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models.presets import PRESETS
from dllm_jax.placement import Footprint, Shapes, decode_mesh, footprint
from dllm_jax.settings import DecodeSettings, MeshSettings, ModelSettings

GIB = 2**30


def tpus(count: int) -> list[SimpleNamespace]:
    def refuse() -> None:
        raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")

    return [
        SimpleNamespace(id=i, platform="tpu", device_kind="TPU v5 lite", coords=(i, 0, 0), memory_stats=refuse)
        for i in range(count)
    ]


def llada(**settings: object) -> Config:
    decode = DecodeSettings(policy="threshold", cache="dual", gen_length=256)
    return Config(model=ModelSettings(preset="llada_8b"), decode=dataclasses.replace(decode, **settings))


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meshes of the same shape as on the TPUs, of the devices here."""

    def make(*, devices: list[SimpleNamespace], **sizes: int) -> jax.sharding.Mesh:
        here = jax.devices()[: len(devices)] if devices[0].platform == "tpu" else devices
        return make_mesh(**sizes, devices=here)

    monkeypatch.setattr(placement, "make_mesh", make)


def test_the_least_tensor_that_fits_then_data(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = decode_mesh(llada(), prompt_length=256, devices=tpus(8))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}  # tensor 1 would take 15.2 GiB: nothing to spare
    err = capsys.readouterr().err
    assert err.startswith("mesh: data 4, fsdp 1, tensor 2 (of 8 x TPU v5 lite, 15.75 GiB each): about ")
    assert "weights 7.47" in err


def test_larger_batches_and_models_take_more_tensor() -> None:
    shapes = [
        decode_mesh(llada(batch_size=batch), prompt_length=prompt, devices=tpus(8)).shape["tensor"]
        for batch, prompt in ((8, 256), (64, 1024), (80, 1024))
    ]
    assert shapes == [2, 2, 4]


def test_small_models_split_the_batch_only() -> None:
    config = dataclasses.replace(llada(), model=ModelSettings(preset="llada_tiny"))
    assert dict(decode_mesh(config, prompt_length=64, devices=tpus(8)).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_what_the_user_gives_stays() -> None:
    config = dataclasses.replace(llada(), mesh=MeshSettings(tensor=1))
    assert decode_mesh(config, prompt_length=256, devices=tpus(8)).shape["tensor"] == 1
    config = dataclasses.replace(llada(), mesh=MeshSettings(data=2))
    assert dict(decode_mesh(config, prompt_length=256, devices=tpus(8)).shape) == {"data": 2, "fsdp": 1, "tensor": 2}


def test_nothing_fits() -> None:
    with pytest.raises(UsageError, match=r"fits into 1 x TPU v5 lite, 15.75 GiB each, got one .* mesh.tensor=2 on 2"):
        decode_mesh(llada(), prompt_length=256, devices=tpus(1))
    with pytest.raises(UsageError, match=r"decode\.batch_size=\d+ would fit"):
        decode_mesh(llada(batch_size=4096), prompt_length=256, devices=tpus(8))
    assert decode_mesh(llada(), prompt_length=256, devices=tpus(1), must_fit=False).size == 1


def test_on_cpu_only_the_batch_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "device_bytes", lambda devices: 1)
    assert dict(decode_mesh(llada(), prompt_length=256).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


# Temporaries and code of compiled programs for v5e, LLaDA-8B with 32 layers on tensor 8, 256 tokens generated, GiB.
PLANNED = [
    ({}, 256, 0.31),
    ({"cache": "prefix"}, 256, 0.85),
    ({"cache": "none"}, 256, 0.02),
    ({"cfg_scale": 1.0}, 256, 0.82),
    ({"gen_length": 1024, "stop": "eot"}, 256, 1.07),
    ({"gen_length": 1024}, 1024, 1.73),
    ({"batch_size": 64}, 1024, 10.33),
]
ON_CHIP = 0.3  # GiB that the compiler may keep out of main memory


@pytest.mark.parametrize(("settings", "prompt_length", "planned"), PLANNED)
def test_the_estimate_is_near_what_the_compiler_plans(
    settings: dict[str, object], prompt_length: int, planned: float
) -> None:
    shapes = Shapes(PRESETS["llada_8b"], {}, jnp.dtype("bfloat16"), "tpu")
    made = footprint(llada(**settings), shapes, make_mesh(data=1, tensor=8), prompt_length=prompt_length)
    assert made.weights / GIB == pytest.approx(1.87, abs=0.01)
    estimate = (made.total - made.weights) / GIB
    assert planned <= estimate <= 1.3 * planned + ON_CHIP


def test_a_torus_that_jax_cannot_lay_out_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As v5p:4x4x4 with a data axis of 32."""

    def refused(*_: object, **__: object) -> None:
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(jax, "make_mesh", refused)
    assert dict(make_mesh(data=4, tensor=2).shape) == {"data": 4, "fsdp": 1, "tensor": 2}


def test_a_verifier_counts() -> None:
    config = llada(policy="apd", cache="window")
    shapes = Shapes(PRESETS["llada_8b"], {}, jnp.dtype("bfloat16"), "gpu")
    made = functools.partial(footprint, config, mesh=make_mesh(data=1), prompt_length=256)
    alone, both = made(shapes), made(shapes._replace(companions={"verifier": PRESETS["qwen2_0_5b"]}))
    assert (both.weights - alone.weights) / 2 == pytest.approx(494e6, rel=0.01)  # its parameters
    assert both.cache > alone.cache
    assert Footprint(10, 20, 30).total == 65
