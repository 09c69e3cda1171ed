"""LoRA adapters in PEFT's layout: merged as weights are read, part of a job's identity, refused by name."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import dllm_jax
from decode import run as decode_run
from dllm_jax import cli
from dllm_jax.checkpoints import adapters, fingerprint, layout, load
from dllm_jax.checkpoints import convert as convert_command
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.config import Config, validate
from dllm_jax.errors import UsageError
from dllm_jax.identity import sources
from dllm_jax.mesh import make_mesh
from dllm_jax.settings import ModelSettings
from tests.checkpoints.folders import GQA, TINY, Tensors, copied, in_dtype, tensors
from tests.checkpoints.peft import PREFIX, RANK, Pairs, changed, drawn, named, written
from tests.traces import GOLDENS

DREAM, QWEN2 = (GOLDENS / "checkpoints" / name for name in ("dream-tiny", "qwen2-tiny"))
EVERY = {
    TINY: ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),  # its head is ff_out too
    GQA: ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    DREAM: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    QWEN2: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
SOME = ("0.v_proj", "1.q_proj", "1.up_proj")
Q0 = "model.transformer.blocks.0.q_proj"
SCALE = 6 / RANK


def params_of(path: Path, **options: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(param) for name, param in layout.flatten(load_model(path, **options).params).items()}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", [TINY, GQA, DREAM, QWEN2], ids=lambda model: model.name)
def test_an_adapter_of_all_matrices(model: Path, tmp_path: Path) -> None:
    pairs = drawn(model, EVERY[model])
    adapter = written(tmp_path / "adapter", named(pairs), lora_alpha=6)
    want = params_of(changed(model, tmp_path / "merged", pairs, scale=SCALE))
    assert_close(params_of(model, adapter=adapter), want)
    plain = params_of(model)
    touched = {name for name in want if not np.array_equal(plain[name], want[name])}
    assert touched == {name for name in want if name.rpartition(".")[2] in layout.INPUTS}


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_some_matrices_on_meshes(
    shape: tuple[int, int, int], stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank-stabilised, of some matrices; with copies of key/value heads, and layers in one array."""
    tuned = load.tuned
    form = {"stacked": stacked}
    monkeypatch.setattr(load, "tuned", lambda *args, **kwargs: dataclasses.replace(tuned(*args, **kwargs), **form))
    pairs = drawn(GQA, SOME)
    assert len(pairs) == 3
    adapter = written(tmp_path / "adapter", named(pairs), lora_alpha=5, use_rslora=True)
    merged = changed(GQA, tmp_path / "merged", pairs, scale=5 / math.sqrt(RANK))
    data, fsdp, tensor = shape
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert_close(params_of(GQA, adapter=adapter, mesh=mesh), params_of(merged, mesh=mesh))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda x: np.dtype(x).name)
def test_sums_are_rounded_once(dtype: Any, tmp_path: Path) -> None:
    """Weights in float32 are not rounded to bfloat16 before the sum; factors are read in any dtype."""
    model = in_dtype(TINY, tmp_path / "model", np.float32)
    pairs: Pairs = {name: (a.astype(dtype), b.astype(dtype)) for name, (a, b) in drawn(model, ["q_proj"]).items()}
    whole: Pairs = {name: (a.astype(np.float32), b.astype(np.float32)) for name, (a, b) in pairs.items()}
    adapter = written(tmp_path / "adapter", named(pairs))
    got = params_of(model, adapter=adapter, dtype="bfloat16")["layers.0.attention.qkv"]
    want = params_of(changed(model, tmp_path / "merged", whole, scale=SCALE))["layers.0.attention.qkv"]
    assert got.dtype == ml_dtypes.bfloat16
    assert (got == want.astype(ml_dtypes.bfloat16)).mean() > 0.999  # sums of products may differ in a last bit


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_converted_folders(quantize: str, tmp_path: Path) -> None:
    pairs = drawn(GQA, EVERY[GQA])
    adapter = written(tmp_path / "adapter", named(pairs))
    convert(GQA, tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    want = params_of(GQA, adapter=adapter, quantize=quantize)
    got = params_of(tmp_path / "orbax", adapter=adapter, quantize=quantize)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert ("layers.0.mlp.down_scale" in got) == bool(quantize)


def test_a_conversion_writes_merged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = drawn(TINY, EVERY[TINY])
    adapter = written(tmp_path / "adapter", named(pairs))
    flags = [f"--source={TINY}", f"--adapter={adapter}", "--to=hf", "--dtype=float32"]
    assert convert_command.main(["convert", *flags, f"--target={tmp_path / 'merged'}"]) == 0
    assert convert_command.main(["convert", *flags, f"--target={adapter}", "--overwrite"]) == 2
    assert "--target: expected a folder apart from --adapter" in capsys.readouterr().err
    got, want = (tensors(folder) for folder in (tmp_path / "merged", changed(TINY, tmp_path / "w", pairs, scale=SCALE)))
    assert_close(got, want)


def test_an_adapter_for_weights_in_8_bits_is_refused(tmp_path: Path) -> None:
    convert(GQA, tmp_path / "int8", to="orbax", dtype="keep", overwrite=False, quantize="int8")
    adapter = written(tmp_path / "adapter", named(drawn(GQA, SOME)))
    with pytest.raises(UsageError, match="expected a model in whole precision for an adapter, got one in int8"):
        load_model(tmp_path / "int8", adapter=adapter)


def without_one(factors: Tensors) -> None:
    del factors[f"{PREFIX}{Q0}.lora_B.weight"]


def of_an_embedding(factors: Tensors) -> None:
    factors[f"{PREFIX}model.transformer.wte.lora_embedding_A"] = np.zeros((RANK, 9), np.float32)


def of_another_layer(factors: Tensors) -> None:
    factors[f"{PREFIX}model.transformer.blocks.99.q_proj.lora_A.weight"] = np.zeros((RANK, 64), np.float32)


def of_another_width(factors: Tensors) -> None:
    factors[f"{PREFIX}{Q0}.lora_A.weight"] = np.zeros((RANK, 65), np.float32)


def of_another_rank(factors: Tensors) -> None:
    factors[f"{PREFIX}{Q0}.lora_A.weight"] = np.zeros((2, 64), np.float32)
    factors[f"{PREFIX}{Q0}.lora_B.weight"] = np.zeros((64, 2), np.float32)


def of_integers(factors: Tensors) -> None:
    factors[f"{PREFIX}{Q0}.lora_A.weight"] = np.zeros((RANK, 64), np.int32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_one, rf"lora_A and lora_B of every matrix, got one of them only: {PREFIX}{Q0}.lora_A.weight"),
        (of_an_embedding, r"expected factors of this model's matrices, got .*wte.lora_embedding_A"),
        (of_another_layer, r"expected factors of this model's matrices, got .*blocks.99.q_proj"),
        (of_another_width, rf"expected \[4, 64\] for {PREFIX}{Q0}.lora_A.weight, got \[4, 65\]"),
        (of_another_rank, rf"expected \[4, 64\] for {PREFIX}{Q0}.lora_A.weight, got \[2, 64\]"),
        (of_integers, r"expected tensors in F64, .*, got .*lora_A.weight \(I32\)"),
        (dict.clear, "lora_A and lora_B of every matrix, got no tensors"),
    ],
)
def test_wrong_tensors_are_named(change: Callable[[Tensors], None], told: str, tmp_path: Path) -> None:
    factors = named(drawn(TINY, ["q_proj"]))
    change(factors)
    adapter = written(tmp_path / "adapter", factors)
    with pytest.raises(UsageError, match=told):
        load_model(TINY, adapter=adapter)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "IA3"}, "field peft_type: expected 'LORA', got 'IA3'"),
        ({"peft_type": None}, "field peft_type: expected 'LORA', got None"),
        ({"bias": "lora_only"}, "field bias: expected none, got 'lora_only'"),
        ({"use_dora": True}, "field use_dora: expected none, got True"),
        ({"fan_in_fan_out": True}, "field fan_in_fan_out"),
        ({"modules_to_save": ["wte"]}, r"field modules_to_save: expected none, got \['wte'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "field rank_pattern: expected none, got {'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "field alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_16"}, "field init_lora_weights: .*, got 'pissa_niter_16'"),
        ({"r": 0}, "field r: expected a positive whole number, got 0"),
        ({"r": True}, "field r: expected a positive whole number, got True"),
        ({"lora_alpha": None}, "field lora_alpha: expected a number, got None"),
        ({"lora_alpha": "16"}, "field lora_alpha: expected a number, got '16'"),
        ({"use_rslora": "yes"}, "field use_rslora: expected true or false, got 'yes'"),
    ],
)
def test_configurations_that_are_not_built_are_named(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", named(drawn(TINY, ["q_proj"])), **fields)
    with pytest.raises(UsageError, match=told):
        load_model(TINY, adapter=adapter)


def test_folders_that_are_none(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", named(drawn(TINY, ["q_proj"])))
    for path in (tmp_path / "nowhere", adapter / "adapter_config.json", "llada-tiny"):
        with pytest.raises(UsageError, match=r"model\.adapter: expected the folder of an adapter, got"):
            load_model(TINY, adapter=path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"expected adapter_model\.safetensors, got adapter_model\.bin"):
        load_model(TINY, adapter=adapter)
    with pytest.raises(UsageError, match=r"expected an adapter with adapter_config\.json, got a model"):
        load_model(TINY, adapter=TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"expected adapter_config\.json, got no such file"):
        load_model(TINY, adapter=tmp_path / "empty")


def test_random_weights_have_none() -> None:
    with pytest.raises(UsageError, match=r"model\.adapter: expected none with model\.preset llada_tiny, got 'x'"):
        validate(Config(model=ModelSettings(preset="llada_tiny", adapter="x")))


def test_an_adapter_in_the_folder_of_its_model(tmp_path: Path) -> None:
    """Such a folder is refused unless the adapter is asked for."""
    pairs = drawn(TINY, ["q_proj"])
    adapter = written(tmp_path / "adapter", named(pairs))
    both = copied(TINY, tmp_path / "both")
    for path in adapter.iterdir():
        path.rename(both / path.name)
    with pytest.raises(UsageError, match=r"beside the weights: .*, or name its folder in model\.adapter"):
        load_model(both)
    assert_close(params_of(both, adapter=both), params_of(changed(TINY, tmp_path / "w", pairs, scale=SCALE)))


@pytest.mark.parametrize("model", [TINY, DREAM], ids=lambda model: model.name)
def test_what_is_saved_is_read(model: Path, tmp_path: Path) -> None:
    config, random = load_model(model).config, np.random.default_rng(0)
    stacks = {
        name: adapters.Factors(
            random.standard_normal((config.num_layers, RANK, matrix.shape[1]), np.float32),
            jax.numpy.asarray(random.standard_normal((config.num_layers, matrix.shape[0], RANK), np.float32)),
        )
        for name, matrix in adapters.modules(config).items()
        if name != "k_proj"
    }
    adapters.save(tmp_path, stacks, config, alpha=6, rslora=False, base="somewhere/model")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    known = {"r": RANK, "lora_alpha": 6, "base_model_name_or_path": "somewhere/model", "use_rslora": False}
    assert known.items() <= fields.items()
    opened = adapters.open_adapter(tmp_path, config)
    for name, matrix in adapters.matrices(config).items():
        pair = opened.factors.get(matrix.path, {}).get(matrix.place)
        if (module := name.rpartition(".")[2]) not in stacks or matrix.layer is None:
            assert pair is None
            continue
        assert pair is not None
        for found, stack in zip(pair, stacks[module], strict=True):
            np.testing.assert_array_equal(found.map(), stack[matrix.layer])


def test_the_head_of_llada_is_none_of_the_targets() -> None:
    """Both have the name ff_out; PEFT matches a string with whole names."""
    config = load_model(TINY).config
    options: dict[str, Any] = {"rank": 4, "alpha": 4, "rslora": False, "base": ""}
    told = adapters.config_fields(config, ["ff_out", "q_proj"], **options)["target_modules"]
    assert told == r"model\.transformer\.blocks\.\d+\.(.*\.)?(ff_out|q_proj)"
    assert adapters.config_fields(config, ["up_proj"], **options)["target_modules"] == ["up_proj"]


def job(adapter: Path, out: Path) -> list[str]:
    settings = {
        "model.path": TINY,
        "model.adapter": adapter,
        "decode.gen_length": 8,
        "decode.block_length": 8,
        "mesh.data": 1,
        "input.path": out.parent / "in.jsonl",
        "output.path": out,
    }
    return ["run", *(f"--config.{name}={value}" for name, value in settings.items())]


def test_the_adapter_is_part_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "p", "prompt_ids": [5, 6, 7]}) + "\n")
    pairs = drawn(TINY, EVERY[TINY])
    adapter = written(tmp_path / "adapter", named(pairs))
    merged = changed(TINY, tmp_path / "merged", pairs, scale=SCALE)
    rows = {}
    for name, flags in {
        "adapter": job(adapter, tmp_path / "a.jsonl"),
        "merged": [*job(adapter, tmp_path / "m.jsonl"), "--config.model.adapter=", f"--config.model.path={merged}"],
        "plain": [*job(adapter, tmp_path / "p.jsonl"), "--config.model.adapter="],
    }.items():
        assert cli.execute(decode_run.main, flags, description="", default_config="configs/vanilla.py") == 0
        path = next(flag for flag in flags if "output.path" in flag).partition("=")[2]
        rows[name] = json.loads(Path(path).read_text())
    assert rows["adapter"] == rows["merged"] != rows["plain"]
    capsys.readouterr()
    fields = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 7}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    flags = job(adapter, tmp_path / "a.jsonl")
    assert cli.execute(decode_run.main, flags, description="", default_config="configs/vanilla.py") == 2
    assert "adapter_config.json of model.adapter" in capsys.readouterr().err
    flags = [*flags, f"--config.output.path={adapter / 'adapter_config.json'}"]
    assert cli.execute(decode_run.main, flags, description="", default_config="configs/vanilla.py") == 2
    assert "expected a place apart from model.adapter" in capsys.readouterr().err


def test_the_content_of_an_adapter_counts(tmp_path: Path) -> None:
    pairs = drawn(TINY, ["q_proj"])
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapter = written(tmp_path / name, named(pairs if not seed else drawn(TINY, ["q_proj"], seed=seed)))
        found = fingerprint.fingerprint(sources(Config(model=ModelSettings(adapter=str(adapter)))))
        digests.append(found["adapter_model.safetensors of model.adapter"])
    assert digests[0] == digests[1] != digests[2]


def test_the_function_of_the_package(tmp_path: Path) -> None:
    pairs = drawn(DREAM, EVERY[DREAM])
    adapter = written(tmp_path / "adapter", named(pairs))
    merged = dllm_jax.load_model(changed(DREAM, tmp_path / "merged", pairs, scale=SCALE))
    tokens = np.arange(12).reshape(2, 6)
    got = dllm_jax.logits(dllm_jax.load_model(DREAM, adapter=str(adapter)), tokens)
    np.testing.assert_allclose(got, dllm_jax.logits(merged, tokens), rtol=1e-5, atol=1e-5)
    assert np.abs(got - dllm_jax.logits(dllm_jax.load_model(DREAM), tokens)).max() > 0.1
