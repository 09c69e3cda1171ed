"""decode.bench from its flags to its JSON, on a model of one layer; no time is asserted."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import pytest

from decode.bench import main
from dllm_jax import cli, load_model
from dllm_jax.bench import ceilings
from dllm_jax.bench.measure import Endless, step_kinds
from dllm_jax.config import Config
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.base import Commit
from dllm_jax.models.presets import PRESETS
from dllm_jax.settings import DecodeSettings, numbers
from tests.traces import GOLDENS

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(GOLDENS / "checkpoints" / "llada-tiny")
STEP = {
    "step",
    "batch_size",
    "canvas_length",
    "columns",
    "seconds",
    "seconds_range",
    "compile_seconds",
    "peak_memory_bytes",
    "cost",
    "steps_per_second",
    "flops_per_second",
    "bytes_per_second",
    "floor_seconds",
    "seconds_over_floor",
}
DECODE = {
    "batch_size",
    "canvas_length",
    "seconds",
    "seconds_range",
    "compile_seconds",
    "peak_memory_bytes",
    "num_tokens",
    "canvas_tokens",
    "nfe_mean",
    "iterations",
    "columns",
    "tokens_per_second",
    "canvas_tokens_per_second",
}
CEILINGS = {"read_bytes_per_second", "copy_bytes_per_second", "matmul_flops_per_second"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "one_layer", dataclasses.replace(PRESETS["llada_tiny"], num_layers=1))
    monkeypatch.setattr(ceilings, "CPU_SIZES", ceilings.Sizes(bytes=2**12, matmul=16, trips=2))


def bench(**settings: object) -> int:
    values = {
        "model.preset": "one_layer",
        "decode.gen_length": 16,
        "decode.block_length": 8,
        "bench.prompt_length": 8,
        "bench.batch_sizes": "2",
        "bench.steps": 2,
        "bench.repeats": 2,
        "mesh.data": 1,
    } | {name.replace("__", "."): value for name, value in settings.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    config = str(ROOT / "configs" / "vanilla.py")
    return cli.execute(main, ["bench", *flags], description="", default_config=config)


def test_every_kind_of_step_and_the_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert bench(decode__cache="dual", decode__cfg_scale=1.0, output__path=path) == 0
    out = capsys.readouterr().out
    assert out.count("| batch | canvas |") == 2
    assert "ceilings: read" in out
    results = json.loads(path.read_text())
    steps, (decode,) = results["steps"], results["decodes"]
    assert [(entry["step"], entry["columns"]) for entry in steps] == [("full", 32), ("cached", 8)]
    assert all(set(entry) == STEP for entry in steps)
    assert all(entry["batch_size"] == 2 and entry["canvas_length"] == 32 for entry in steps)
    assert all(entry["peak_memory_bytes"] > 0 for entry in [*steps, decode])
    assert set(decode) == DECODE
    assert decode["canvas_tokens"] == 2 * 16
    assert decode["nfe_mean"] == decode["iterations"] == 16  # one token a forward
    assert set(results["ceilings"]) == CEILINGS
    assert results["config"]["decode"]["cache"] == "dual"
    assert results["device"]["platform"] == "cpu"
    assert {"jax", "python"} <= set(results["versions"])
    assert "memory_analysis" in results["peak_memory_source"]


@pytest.mark.slow
def test_a_stop_rule_saves_columns_not_only_forwards(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert bench(decode__gen_length=128, decode__stop="eot", bench__eos_logit=8.0, output__path=path) == 0
    (decode,) = json.loads(path.read_text())["decodes"]
    assert decode["nfe_mean"] < 128  # one token a forward
    assert decode["columns"] < decode["iterations"] * decode["canvas_length"]


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("none", [("full", 128, 0)]), ("prefix", [("full", 128, 0), ("cached", 24, 3), ("cached", 96, 0)])],
)
def test_the_narrowest_and_the_widest_cached_step(cache: str, expected: list[tuple[str, int, int]]) -> None:
    settings = DecodeSettings(cache=cache, gen_length=96, block_length=24)
    engine = Decoder(load_model(CHECKPOINT), Config(decode=settings)).engine(20)
    assert [(kind.name, kind.columns, kind.block) for kind in step_kinds(engine)] == expected


def test_an_exact_cached_step_computes_the_positions_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_blocks = dataclasses.replace(PRESETS["one_layer"], family="sdar", causal_block=8, block_causal=True)
    monkeypatch.setitem(PRESETS, "by_blocks", by_blocks)
    path = tmp_path / "bench.json"
    assert bench(model__preset="by_blocks", decode__policy="dynamic", output__path=path) == 0
    steps = json.loads(path.read_text())["steps"]
    assert [(step["step"], step["columns"]) for step in steps] == [
        ("full", steps[0]["canvas_length"] - 24),
        ("cached", 8),
    ]


def test_batch_sizes_are_a_list_of_numbers() -> None:
    assert numbers("bench.batch_sizes", "1, 8,16") == (1, 8, 16)


def test_the_policy_works_on_but_no_row_leaves() -> None:
    one = jnp.array([[1]])
    commit = Commit(mask_BQ=one > 0, token_BQ=one, leave_B=jnp.array([True]), policy_state=(), end_B=jnp.array([0]))
    policy = Mock(**{"commit.return_value": commit})
    endless = Endless(policy).commit((), None, None, None)
    assert endless[:2] == commit[:2]
    assert not endless.leave_B.any()
    assert endless.end_B is None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("bench__batch_sizes", "1,x", "bench.batch_sizes: expected positive numbers like 1,8, got '1,x'"),
        ("bench__batch_sizes", "", "bench.batch_sizes: expected positive numbers"),
        ("bench__batch_sizes", "0", "bench.batch_sizes: expected positive numbers"),
        ("bench__repeats", 0, "bench.repeats: expected at least 1, got 0"),
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


def test_prompts_longer_than_the_model_allows(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(model__preset="", model__path=CHECKPOINT, bench__prompt_length=5000) == 2
    assert "error: bench.prompt_length: prompt: expected at most" in capsys.readouterr().err


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
    monkeypatch.setenv("XLA_FLAGS", "")
    assert bench(bench__repeats=0, model__quantize="int8") == 2
    assert cli.os.environ["XLA_FLAGS"] == ""  # only Triton reads integers as they are
