"""decode.plan of a training: what its step takes on the devices here, and LLaDA-8B's on TPUs that are not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from decode.plan import main
from dllm_jax import cli
from dllm_jax.bench import plan as planning
from dllm_jax.bench.plan import Rates
from dllm_jax.training.diffusion import plan
from dllm_jax.training.diffusion.config import DiffusionTraining
from tests.training.commands import FROM_FOLDER

ROOT = Path(__file__).parents[3]
SMALL = (
    "network.num_layers=1",
    "network.embed_dim=32",
    "network.mlp_dim=32",
    "train.batch_size=8",
    "data.length=32",
    "train.optimizer=adamw",
)
tpu = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"),
]


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # which the command sets
    monkeypatch.setattr(planning, "rates_of", lambda *_: Rates(1e10, 1e11, None))


def run(*settings: str, config: str = "train_tiny_cpu") -> int:
    flags = [f"--config.{setting}" for setting in settings]
    path = str(ROOT / "configs" / f"{config}.py")
    return cli.execute(main, ["plan", *flags], description="", default_config=path, others=[DiffusionTraining])


def planned(path: Path, *settings: str) -> dict[str, Any]:
    assert run(*SMALL, f"output.path={path}", *settings) == 0
    results: dict[str, Any] = json.loads(path.with_name(path.name + ".plan.json").read_text())
    return results


def test_every_length_has_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = planned(tmp_path / "out", "data.buckets=16", "mesh.data=2")
    out = capsys.readouterr().out
    assert "| canvas |" in out
    assert "mesh data 2, fsdp 1, tensor 1 of the devices here" in out
    assert [program["canvas_length"] for program in results["programs"]] == [16, 32]
    shorter, longer = results["programs"]
    assert shorter["temp_bytes"] < longer["temp_bytes"]
    assert set(longer["loops"]["step"]) == {"collectives", "floor_ms", "bound_by"}
    assert longer["loops"]["step"]["collectives"]["all-reduce"]["count"] >= 1  # of the gradient
    # 6 operations for every weight and token: the layer and the head, not the embedding; and the scores.
    weights, tokens = 4 * 32 * 32 + 3 * 32 * 32 + 3 * 32 + 32 * 512, 8 * 32
    floor = 6 * tokens * (weights + 2 * 32 * 32) / 2 / 1e11
    assert longer["loops"]["step"]["floor_ms"] == pytest.approx(1e3 * floor)


def test_memory_falls_with_fsdp_and_an_adapter_has_no_moments(tmp_path: Path, teacher: Path) -> None:
    def arguments(name: str, *settings: str) -> int:
        results = planned(tmp_path / name, "mesh.data=1", *settings)
        return int(results["programs"][0]["argument_bytes"])

    alone, split = arguments("1", "mesh.fsdp=1"), arguments("8", "mesh.fsdp=8")
    assert split < 0.15 * alone
    of_file = (*FROM_FOLDER, f"model.path={teacher}")
    assert arguments("l", *of_file, "lora.rank=2") < 0.4 * arguments("w", *of_file)


def test_what_does_not_fit_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "device_bytes", lambda devices: 100_000)
    assert run(*SMALL, "mesh.data=1", f"output.path={tmp_path / 'out'}") == 1
    out, err = capsys.readouterr()
    assert "(8 x cpu): does not fit" in out
    assert err.startswith("does not fit: with canvases of 32 tokens every device needs at least ")
    assert "and has 0.10 MiB; less is needed with more mesh.fsdp or train.microbatches, train.remat=true, or" in err


def test_a_training_plans_its_decode_too_and_nothing_else_a_training(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        f"model.path={teacher}",
        f"output.path={tmp_path / 'new' / 'out'}",
        "plan.program=decode",
        "decode.gen_length=16",
        "decode.block_length=16",
        "plan.prompt_length=16",
    )
    assert run(*settings, "mesh.data=1", "decode.batch_size=2") == 0
    assert "| prompt |" in capsys.readouterr().out
    assert run("plan.program=train", config="threshold") == 2
    assert "plan.program: expected decode with this experiment, got train" in capsys.readouterr().err
    assert run("plan.topology=h100") == 2
    assert (
        "plan.topology: expected TPUs, or nothing for the devices here, to train, got h100" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("topology", "settings"),
    [
        pytest.param("v5e:8x8", ("mesh.fsdp=64", "data.length=4096"), marks=tpu, id="full"),
        pytest.param(
            "v5e:2x4",
            ("mesh.fsdp=8", "lora.rank=16", "train.batch_size=32", "data.length=2048"),
            marks=tpu,
            id="LoRA",
        ),
    ],
)
def test_llada_8b_fits(tmp_path: Path, topology: str, settings: tuple[str, ...]) -> None:
    path = tmp_path / "out"
    given = (f"plan.topology={topology}", "model.preset=llada_8b", f"output.path={path}", "data.buckets=", *settings)
    flags = [f"--config.{setting}" for setting in given]
    command = [sys.executable, "-m", "decode.plan", "--config=sft_llada", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.plan.json").read_text())
    (program,) = results["programs"]
    print({name: size for name, size in program.items() if name != "loops"}, program["loops"]["step"])
    assert results["fits"]
    step = program["loops"]["step"]
    assert set(step["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert plan.LENGTH in program
