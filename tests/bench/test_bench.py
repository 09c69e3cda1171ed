"""decode.bench from its flags to its JSON, on a model of one layer; no time is asserted."""

import dataclasses
import json
from pathlib import Path

import pytest

from decode.bench import main
from dllm_jax import cli
from dllm_jax.bench import ceilings
from dllm_jax.models.registry import PRESETS

ROOT = Path(__file__).parents[2]
STEP = {
    "step", "batch_size", "canvas_length", "columns", "seconds", "seconds_range", "compile_seconds",
    "peak_memory_bytes", "cost", "steps_per_second", "flops_per_second", "bytes_per_second", "floor_seconds",
    "seconds_over_floor",
}  # fmt: skip
DECODE = {
    "batch_size", "canvas_length", "seconds", "seconds_range", "compile_seconds", "peak_memory_bytes", "num_tokens",
    "canvas_tokens", "nfe_mean", "iterations", "tokens_per_second", "canvas_tokens_per_second",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "one_layer", dataclasses.replace(PRESETS["llada_tiny"], num_layers=1))
    monkeypatch.setattr(ceilings, "CPU_SIZES", ceilings.Sizes(bytes=2**12, matmul=16, trips=2))


def bench(**settings: object) -> int:
    values = {
        "model.preset": "one_layer", "decode.gen_length": 32, "decode.block_length": 8, "bench.prompt_length": 8,
        "bench.batch_sizes": "2", "bench.steps": 2, "bench.repeats": 2, "mesh.data": 1,
    } | {name.replace("__", "."): value for name, value in settings.items()}  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    config = str(ROOT / "configs" / "vanilla.py")
    return cli.execute(main, ["bench", *flags], description="", default_config=config)


@pytest.mark.parametrize(("cache", "columns"), [("none", [64]), ("dual", [64, 8]), ("prefix", [64, 8, 32])])
def test_every_kind_of_step_and_the_decode(tmp_path: Path, cache: str, columns: list[int]) -> None:
    path = tmp_path / "bench.json"
    assert bench(decode__cache=cache, output__path=path) == 0
    results = json.loads(path.read_text())
    assert [entry["columns"] for entry in results["steps"]] == columns
    assert [entry["step"] for entry in results["steps"]] == ["full"] + ["cached"] * (len(columns) - 1)
    assert all(set(entry) == STEP for entry in results["steps"])
    (decode,) = results["decodes"]
    assert set(decode) == DECODE
    assert decode["batch_size"] == 2
    assert decode["canvas_tokens"] == 64
    assert decode["nfe_mean"] == 32  # one token a forward
    assert all(entry["canvas_length"] == 64 and entry["peak_memory_bytes"] > 0 for entry in results["steps"])
    assert set(results["ceilings"]) == {
        "read_bytes_per_second", "copy_bytes_per_second", "matmul_flops_per_second",
    }  # fmt: skip
    assert results["config"]["decode"]["cache"] == cache
    assert results["device"]["platform"] == "cpu"
    assert {"jax", "python"} <= set(results["versions"])
    assert "memory_analysis" in results["peak_memory_source"]


def test_tables_and_batch_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(bench__batch_sizes="1, 2", decode__temperature=0.5, decode__cfg_scale=1.0) == 0
    out = capsys.readouterr().out
    assert out.count("full") == 2
    assert "| batch | canvas |" in out
    assert "ceilings: read" in out


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("bench__batch_sizes", "1,x", "bench.batch_sizes: expected positive numbers like 1,8, got '1,x'"),
        ("bench__batch_sizes", "", "bench.batch_sizes: expected positive numbers"),
        ("bench__batch_sizes", "0", "bench.batch_sizes: expected positive numbers"),
        ("bench__repeats", 0, "bench.repeats: expected at least 1, got 0"),
        ("bench__prompt_length", 5000, "bench.prompt_length: prompt: expected at most 4064 tokens"),
        ("output__path", "/no/such/folder/bench.json", "output.path: expected a file that can be written"),
        ("model__preset", "llada_9b", "model.preset: expected one of"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], field: str, value: object, expected: str) -> None:
    assert bench(**{field: value}) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_the_xla_flag_is_added_once_and_never_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in [
        ("", "--xla_gpu_enable_triton_gemm=false"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_enable_triton_gemm=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ]:
        monkeypatch.setenv("XLA_FLAGS", given)
        for _ in range(2):
            assert bench(bench__repeats=0) == 2  # refused, behind the environment
            assert cli.os.environ["XLA_FLAGS"] == expected
