"""decode.plan from its flags to its JSON, and what it says of a decode that does not fit."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from decode.plan import main
from dllm_jax import cli
from dllm_jax.bench import plan
from dllm_jax.bench.ceilings import Ceilings
from dllm_jax.bench.cost import Cost
from dllm_jax.chips import CHIPS, GPUS, TPUS, chip_of
from dllm_jax.errors import UsageError
from dllm_jax.hlo import Moved
from dllm_jax.models.presets import PRESETS

ROOT = Path(__file__).parents[2]
PLAN = {
    "topology",
    "chip",
    "devices",
    "mesh",
    "fits",
    "memory_per_device",
    "usable_per_device",
    "platform",
    "estimated",
    "programs",
}
PROGRAM = {"prompt_length", "compile_seconds", "argument_bytes", "temp_bytes", "output_bytes", "code_bytes", "loops"}
LOOP = {"collectives", "weight_copies", "cache_copies", "floor_ms", "bound_by"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # which the command sets
    monkeypatch.setitem(PRESETS, "one_layer", dataclasses.replace(PRESETS["llada_tiny"], num_layers=1))
    rates = Ceilings(read_bytes_per_second=1e10, copy_bytes_per_second=1e10, matmul_flops_per_second=1e11)
    monkeypatch.setattr(plan, "measure_ceilings", lambda *_, **__: rates)


def run(*settings: str) -> int:
    flags = [f"--config.{setting}" for setting in ("decode.gen_length=16", "decode.block_length=8", *settings)]
    config = str(ROOT / "configs" / "threshold.py")
    return cli.execute(main, ["plan", *flags], description="", default_config=config)


def test_the_bundled_model_on_the_devices_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    mesh = ("mesh.data=1", "mesh.tensor=2", "decode.batch_size=2")
    assert run(*mesh, "plan.prompt_length=2000", f"output.path={path}") == 0
    out, err = capsys.readouterr()
    assert "fits" in out
    assert out.count("| prompt |") == 2
    assert "plan.prompt_length: 1136 instead of 2000" in err  # of the model's 1152
    results = json.loads(path.read_text())
    assert set(results) == PLAN
    assert results["estimated"] is False
    assert results["topology"] == ""
    assert results["devices"] == 8
    assert results["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2}
    assert results["fits"] is True
    (program,) = results["programs"]
    assert set(program) == PROGRAM
    assert program["prompt_length"] == 1136
    assert program["argument_bytes"] > 1_600_000 * 4 / 2  # half of the weights
    assert set(program["loops"]) == {"full", "cached"}
    for loop, columns in zip(program["loops"].values(), (1152, 8), strict=True):
        assert set(loop) == LOOP
        assert loop["floor_ms"] > 0
        summed = loop["collectives"]["all-reduce"]
        assert summed["count"] >= 1 + 2 * 8  # of the embedding, and two of every layer
        assert summed["bytes"] >= (1 + 2 * 8) * 2 * columns * 128 * 4
    assert program["loops"]["cached"]["weight_copies"] == 0


def test_what_does_not_fit_is_told_with_what_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "device_bytes", lambda devices: 1_400_000)
    path = tmp_path / "plan.json"
    settings = ("model.preset=one_layer", "mesh.data=1", "decode.cache=none", "plan.prompt_length=16")
    assert run(*settings, f"output.path={path}") == 1
    out, err = capsys.readouterr()
    assert "does not fit" in out
    assert err.startswith("does not fit: with prompts of 16 tokens every device needs ")
    assert " (argument 1.32 MiB, temp " in err
    assert "and has 1.34 MiB; by estimate mesh.tensor=4 on 4 of these devices, or decode.batch_size=1 would fit" in err
    results = json.loads(path.read_text())
    assert results["fits"] is False
    assert results["memory_per_device"] == 1_400_000
    assert "cached" not in results["programs"][0]["loops"]


def test_a_program_that_the_compiler_refuses_is_a_plan_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (46.5G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(plan.driver, "decode", type("Refused", (), {"lower": refuse}))
    assert run("model.preset=one_layer", "mesh.data=1", "plan.prompt_length=16") == 1
    out, err = capsys.readouterr()
    assert "too much" in out
    assert "needs more than there is (argument 1.32 MiB, temp 46.50 GiB)" in err
    assert "by estimate no other mesh, weights or batch would fit" in err


def test_a_gpu_that_is_not_here_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of 14.9 GiB in bfloat16 leave a card of 16 too little, those of 8 GiB in int8 do not."""
    path = tmp_path / "plan.json"
    common = ("model.preset=llada_8b", "plan.topology=rtx4080", "decode.cache=dual", f"output.path={path}")
    assert run(*common, "model.dtype=bfloat16") == 1
    assert "model.quantize=int8" in capsys.readouterr().err
    assert run(*common, "model.dtype=bfloat16", "model.quantize=int8") == 0
    assert "(1 x rtx4080, estimated): fits" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert set(results) == PLAN
    assert (results["estimated"], results["memory_per_device"]) == (True, 16 * 2**30)
    (program,) = results["programs"]
    assert set(program) == PROGRAM
    matrices, rows = 32 * 218_112_000 - 32 * 2 * 4096, 126464 * 4096  # the head is a matrix, the embedding is not
    assert program["argument_bytes"] == pytest.approx(matrices + rows + 2 * rows, rel=2e-3)
    assert program["loops"] == {}
    assert run(*common, "mesh.tensor=2") == 2
    assert "mesh: expected one device with plan.topology rtx4080, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v9:2x2", "2x4", ""])
def test_an_unknown_topology_is_one_line_with_those_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"plan\.topology: expected one of v5e, v6e, v5p, v4, tpu7x .* got '"):
        plan.topology_devices(name)


def test_topologies_need_libtpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert run("plan.topology=v5e:2x4") == 2
    assert "error: packages: expected those of pip install 'dllm_jax[tpu]', got no libtpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("plan.prompt_length=64,x", "plan.prompt_length: expected positive numbers like 1,8, got '64,x'"),
        ("decode.gen_length=4096", "decode.gen_length: expected room for a prompt"),
        ("model.preset=llada_9b", "model.preset: expected one of"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], setting: str, expected: str) -> None:
    assert run(setting) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (plan.Rates(1e3, 1e9, 1e9), (1100.0, "weights")),
        (plan.Rates(1e9, 1e2, 1e9), (5e3, "matrix products")),
        (plan.Rates(1e9, 1e9, 10.0), (1e5, "links")),
        (plan.Rates(1e9, 1e9, None), (1.1e-3, "weights")),
    ],
)
def test_floors(rates: plan.Rates, expected: tuple[float, str]) -> None:
    floor, bound = rates.floor(Cost(500, 1100), Cost(0, 900), [Moved("all-gather", 2000, 2)])
    assert (pytest.approx(floor), bound) == expected


def test_keys_and_values_can_bound_a_step() -> None:
    assert plan.Rates(1e3, 1e9, 1e9).floor(Cost(500, 1100), Cost(0, 200), [])[1] == "keys and values"


def test_chips_by_the_kind_that_their_devices_tell() -> None:
    kinds = ("TPU v5 lite", "TPU v6 lite", "TPU v5", "TPU v5p", "TPU v4", "TPU7x", "NVIDIA H100 80GB HBM3", "cpu")
    names = [chip.name if (chip := chip_of(kind)) else None for kind in kinds]
    assert names == ["v5e", "v6e", "v5p", "v5p", "v4", "tpu7x", "h100", None]
    assert {*TPUS, *GPUS} == {chip.name for chip in CHIPS}
    assert CHIPS[0].share(2).memory == CHIPS[0].memory // 2
