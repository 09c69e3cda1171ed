"""Mixtures of experts: routes by a NumPy reference and as recorded, both grouped products, meshes, 8 bits, files."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax.api import logits
from dllm_jax.checkpoints import hf, layout, load
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.mesh import make_mesh
from dllm_jax.models import experts, registry
from dllm_jax.models.attention import Watch
from dllm_jax.models.experts import ExpertSettings, Matrices, Matrix, Routes, grouped, route
from dllm_jax.models.model import Model
from dllm_jax.models.quantize import quantized
from tests.checkpoints.folders import copied, in_dtype, same_bits, tensors, with_fields, with_tensors
from tests.checkpoints.peft import RANK, changed, drawn, named, written
from tests.traces import GOLDENS, cases

CHECKPOINTS = GOLDENS / "checkpoints"
LLADA2, SHARDED = CHECKPOINTS / "llada2-tiny", CHECKPOINTS / "llada2-tiny-sharded"
NAMES = ("llada2-tiny", "llada2-tiny-b", "lladamoe-tiny", "lladamoe-tiny-b", "sdarmoe-tiny")
CASES = {case.meta["checkpoint"]: case for case in cases("M_models") if "_logits_" in case.name}
TOKENS = CASES["llada2-tiny"].arrays["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_weights_are_those_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program around them, the routes of every layer are there to be looked at."""
    found: list[Routes] = []
    monkeypatch.setattr(experts, "route", lambda *args, **kw: found.append(route(*args, **kw)) or found[-1])
    case, model = CASES[name], load_model(CHECKPOINTS / name)
    module = nnx.merge(model.graphdef, model.params)
    tokens = jnp.asarray(case.arrays["input_ids"])
    # LLaDA2's were recorded with blocks of 8
    module.config = (
        dataclasses.replace(model.config, causal_block=case.meta.get("block_length", 0))
        if ("llada2" in name)
        else model.config
    )
    module(tokens, jnp.arange(tokens.shape[1])[None].repeat(2, axis=0), real_BS=jnp.ones(tokens.shape, bool))
    want_experts, want_weights = case.arrays["router_experts"], case.arrays["router_weights"]
    assert len(found) == len(want_experts)
    for routes, experts_BTC, weights_BTC in zip(found, want_experts, want_weights, strict=True):
        shape = experts_BTC.shape
        ours, theirs = np.asarray(routes.experts_NC).reshape(shape), experts_BTC
        by_number, by_theirs = ours.argsort(axis=-1), theirs.argsort(axis=-1)
        np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
        weights = np.take_along_axis(np.asarray(routes.weights_NC).reshape(shape), by_number, axis=-1)
        np.testing.assert_allclose(weights, np.take_along_axis(weights_BTC, by_theirs, axis=-1), rtol=0, atol=2e-5)


def expected_routes(x: np.ndarray, router: np.ndarray, bias: np.ndarray, settings: ExpertSettings) -> list[dict]:
    """Per token {expert: weight}, one token and one expert after the other."""
    found = []
    for token in x.astype(np.float64):
        logits = token @ router
        score = 1 / (1 + np.exp(-logits)) if settings.sigmoid else np.exp(logits) / np.exp(logits).sum()
        ranked = score + bias
        size = settings.count // settings.groups
        group = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(settings.groups)]
        best = sorted(range(settings.groups), key=lambda g: (-group[g], g))[: settings.groups_per_token]
        allowed = [e for e in range(settings.count) if e // size in best]
        chosen = sorted(allowed, key=lambda e: (-ranked[e], e))[: settings.per_token]
        weight = {e: (ranked if settings.bias_counts else score)[e] for e in chosen}
        total = sum(weight.values()) if settings.normalized else 1
        found.append({e: settings.scale * each / total for e, each in weight.items()})
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"sigmoid": True, "wide_gate": True, "groups": 4, "groups_per_token": 2, "normalized": True, "scale": 2.5},
        {"bias_counts": True},
        {"normalized": True},
        {"groups": 12, "groups_per_token": 5, "sigmoid": True},
    ],
    ids=str,
)
def test_routes_by_the_definition(changes: dict[str, Any]) -> None:
    settings = ExpertSettings(**{"count": 12, "per_token": 3, "hidden_dim": 4, "biased": True} | changes)
    random = np.random.default_rng(0)
    x, router, bias = random.normal(size=(40, 8)), random.normal(size=(8, 12)), random.normal(0, 0.3, size=12)
    with jax.enable_x64(True):
        routes = route(jnp.asarray(x), jnp.asarray(router), jnp.asarray(bias), settings=settings)
    for row, want in enumerate(expected_routes(x, router, bias, settings)):
        got = dict(zip(routes.experts_NC[row].tolist(), routes.weights_NC[row].tolist(), strict=True))
        assert got.keys() == want.keys()
        assert [got[e] for e in want] == pytest.approx(list(want.values()), abs=1e-12)


def test_of_equal_experts_the_first_are_taken() -> None:
    settings = ExpertSettings(count=8, per_token=3, hidden_dim=4, groups=4, groups_per_token=2, sigmoid=True)
    routes = route(jnp.ones((2, 4)), jnp.zeros((4, 8)), None, settings=settings)
    np.testing.assert_array_equal(routes.experts_NC, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(routes.weights_NC, 0.5)


def test_the_gate_of_llada2_is_in_float32() -> None:
    settings = ExpertSettings(count=2, per_token=1, hidden_dim=4, wide_gate=True, sigmoid=True)
    x = jnp.full((1, 512), 1.0, jnp.bfloat16)
    router = jnp.stack([jnp.full(512, 1.0), jnp.full(512, 1.0).at[0].set(1.0078125)], axis=1).astype(jnp.bfloat16)
    assert route(x, router, None, settings=settings).experts_NC.tolist() == [[0]]  # both saturate
    small = router / 512
    assert route(x, small, None, settings=settings).experts_NC.tolist() == [[1]]
    narrow = dataclasses.replace(settings, wide_gate=False)
    assert route(x, small, None, settings=narrow).experts_NC.tolist() == [[0]]  # rounded to the same


def mixture(*, dtype: Any = jnp.float32, tokens: int = 37, layers: int = 2) -> tuple[jax.Array, Routes, Matrices]:
    """Tokens, routes and the matrices of several layers of 8 experts, of which one gets no token and one many."""
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(tokens, 16)), dtype)
    chosen = np.stack([random.permutation([0, 1, 2, 4, 5, 6, 7])[:3] for _ in range(tokens)])
    chosen[: tokens // 2, 0] = 6
    chosen[: tokens // 2, 1:] = [1, 2]
    shapes = ((layers, 8, 16, 12), (layers, 8, 16, 12), (layers, 8, 12, 16))
    matrices = Matrices(*(Matrix(jnp.asarray(random.normal(0, 0.3, shape), dtype)) for shape in shapes))
    weights = jnp.asarray(random.uniform(size=chosen.shape), jnp.float32)
    return x, Routes(jnp.asarray(chosen, jnp.int32), weights), matrices


def expected(x: jax.Array, routes: Routes, matrices: Matrices, *, layer: int) -> np.ndarray:
    gate, up, down = (np.asarray(each.values[layer], np.float64) for each in matrices)
    tokens, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for n, (chosen, weights) in enumerate(zip(*map(np.asarray, routes), strict=True)):
        for e, weight in zip(chosen, weights, strict=True):
            hidden = tokens[n] @ gate[e]
            out[n] += weight * ((hidden / (1 + np.exp(-hidden)) * (tokens[n] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("tokens", [1, 37, 300])
@pytest.mark.parametrize("name", list(experts.KERNELS))
def test_grouped_products(name: str, tokens: int) -> None:
    x, routes, matrices = mixture(tokens=tokens)
    for layer in range(2):
        got = jax.jit(grouped, static_argnames="name")(x, routes, matrices, layer=layer, name=name)
        np.testing.assert_allclose(got, expected(x, routes, matrices, layer=layer), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list(experts.KERNELS))
def test_parts_of_the_experts_add_up(name: str) -> None:
    x, routes, matrices = mixture()
    total = np.zeros(x.shape)
    for part in range(4):
        own = jax.tree.map(lambda leaf, part=part: leaf[:, 2 * part : 2 * part + 2], matrices)
        total += grouped(x, routes, own, layer=1, name=name, part=part, parts=4)
    np.testing.assert_allclose(total, expected(x, routes, matrices, layer=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", list(experts.KERNELS))
def test_experts_in_8_bits(name: str, dtype: Any) -> None:
    """As with the dequantized matrices, and within the error of the integers of those in whole precision."""
    x, routes, matrices = mixture(dtype=dtype)
    integers = Matrices(*(Matrix(*quantized(each.values, axes=(2,))) for each in matrices))
    back = Matrices(*(Matrix(each.values.astype(jnp.float32) * each.scale[:, :, None]) for each in integers))
    got = np.asarray(grouped(x, routes, integers, layer=1, name=name), np.float64)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(got, expected(x, routes, back, layer=1), rtol=0, atol=tolerance)
    whole = expected(x, routes, matrices, layer=1)
    assert np.abs(got - whole).max() < 0.05 * np.abs(whole).max()


def test_the_loop_and_ragged_dot_where_they_are_meant() -> None:
    assert experts.kernel("tpu", differentiable=False) == "ragged"
    assert experts.kernel("cpu", differentiable=False) == experts.kernel("gpu", differentiable=False) == "looped"
    assert experts.kernel("cpu", differentiable=True) == "ragged"
    x, routes, matrices = mixture()
    gradient = jax.grad(lambda x: grouped(x, routes, matrices, layer=0, name="ragged").sum())(x)
    assert np.isfinite(gradient).all()


def stacked(monkeypatch: pytest.MonkeyPatch, path: Path, **how: Any) -> Model:
    tuned = load.tuned
    monkeypatch.setattr(load, "tuned", lambda *args, **kw: dataclasses.replace(tuned(*args, **kw), stacked=True))
    model = load_model(path, **how)
    monkeypatch.undo()
    assert model.config.stacked
    return model


@pytest.mark.parametrize(("name", "quantize"), [("llada2-tiny", ""), ("sdarmoe-tiny", "int8")])
def test_stacked_layers(name: str, quantize: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = CHECKPOINTS / name
    one, many = load_model(path, quantize=quantize), stacked(monkeypatch, path, quantize=quantize)
    got = layout.flatten(many.params)
    dense = len(one.config.experts.dense_layers)
    assert many.config.apart == dense
    assert got["layers.experts.expert_gate"].shape == (one.config.num_layers - dense, 16, 64, 32)
    assert ("first.mlp.down" in got) == bool(dense)
    np.testing.assert_allclose(logits(many, TOKENS), logits(one, TOKENS), rtol=0, atol=1e-4)
    if not quantize:
        hf.export_hf(many, tmp_path / "m")
        assert same_bits(tensors(tmp_path / "m"), tensors(path))


def test_keys_values_and_attention_of_stacked_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    models = (load_model(LLADA2), stacked(monkeypatch, LLADA2))
    tokens, positions = jnp.asarray(TOKENS), jnp.arange(40)[None].repeat(2, axis=0)
    real = jnp.ones(tokens.shape, bool)

    @partial(jax.jit, static_argnames="layers")
    def watched(graphdef: Any, params: nnx.State, *, layers: int) -> Any:
        watch = Watch(first=jnp.int32(8), width=4, layers=layers)
        return nnx.merge(graphdef, params).watched(tokens, positions, real_BS=real, watch=watch)

    for layers in (1, 3):
        listed, one = (watched(model.graphdef, model.params, layers=layers) for model in models)
        np.testing.assert_allclose(one[0], listed[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(one[1].k, jnp.stack([each.k for each in listed[1]]), rtol=0, atol=1e-5)
        np.testing.assert_allclose(one[2].rows_BQS, listed[2].rows_BQS, rtol=0, atol=1e-6)

    @jax.jit
    def in_part(graphdef: Any, params: nnx.State) -> Any:
        module = nnx.merge(graphdef, params)
        whole, cache = module(tokens, positions, real_BS=real)
        part = module(tokens[:, 8:16], positions[:, 8:16], real_BS=real, cache=cache, start=jnp.int32(8))
        return whole, cache, *part

    whole, cache, part, again = in_part(models[1].graphdef, models[1].params)
    np.testing.assert_allclose(part, whole[:, 8:16], rtol=0, atol=1e-5)
    np.testing.assert_allclose(again.v, cache.v, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "form"), [((1, 1, 8), "list"), ((2, 2, 2), "list"), ((2, 2, 2), "stacked")])
def test_on_a_mesh(shape: tuple[int, int, int], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    path = CHECKPOINTS / "llada2-tiny"
    model = load_model(path, mesh=mesh) if form == "list" else stacked(monkeypatch, path, mesh=mesh)
    leaf = layout.flatten(model.params)["layers.1.experts.expert_up" if form == "list" else "layers.experts.expert_up"]
    assert leaf.size == shape[2] * leaf.addressable_shards[0].data.size
    tokens = np.concatenate([TOKENS] * 4)
    np.testing.assert_allclose(logits(model, tokens), logits(load_model(path), tokens), rtol=0, atol=1e-4)


def test_experts_that_a_mesh_does_not_divide_are_on_all_devices() -> None:
    model = load_model(CHECKPOINTS / "lladamoe-tiny-b", mesh=make_mesh(tensor=3))
    alone = load_model(CHECKPOINTS / "lladamoe-tiny-b")
    np.testing.assert_allclose(logits(model, TOKENS), logits(alone, TOKENS), rtol=0, atol=1e-4)


def test_a_sharded_folder_holds_the_same_model(tmp_path: Path) -> None:
    np.testing.assert_array_equal(logits(load_model(LLADA2), TOKENS), logits(load_model(SHARDED), TOKENS))
    convert(SHARDED, tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(SHARDED), tensors(tmp_path / "hf"))


def test_all_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    def stack(edited: dict[str, np.ndarray]) -> None:
        for layer in (1, 2):
            for kind in ("gate", "up", "down"):
                names = [f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight" for e in range(16)]
                edited[f"model.layers.{layer}.mlp.experts.{kind}_proj"] = np.stack([edited.pop(n) for n in names])

    one = with_tensors(LLADA2, tmp_path / "one", stack)
    folder = with_fields(one, tmp_path / "m", model_type="llada2_moe_veomni")
    np.testing.assert_array_equal(logits(load_model(folder), TOKENS), logits(load_model(LLADA2), TOKENS))
    hf.export_hf(load_model(folder), tmp_path / "export")
    assert same_bits(tensors(folder), tensors(tmp_path / "export"))
    spread = load_model(folder, mesh=make_mesh(tensor=4))
    np.testing.assert_allclose(logits(spread, TOKENS), logits(load_model(LLADA2), TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kept", [True, False], ids=["bias in float32", "bias in bfloat16"])
def test_the_bias_of_a_router_keeps_its_dtype(tmp_path: Path, kept: bool) -> None:
    folder = in_dtype(LLADA2, tmp_path / "half", jnp.bfloat16)
    biases = {name: value for name, value in tensors(LLADA2).items() if name.endswith("expert_bias")}
    if kept:
        folder = with_tensors(folder, tmp_path / "mixed", lambda edited: edited.update(biases))
    model = load_model(folder, dtype="keep")
    params = layout.flatten(model.params)
    assert model.dtype == params["layers.1.experts.router"].dtype == jnp.bfloat16
    assert params["layers.1.experts.router_bias"].dtype == (jnp.float32 if kept else jnp.bfloat16)
    convert(folder, tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(folder), tensors(tmp_path / "hf"))
    assert load_model(tmp_path / "orbax", dtype="keep").config == model.config


def test_8_bits_of_all_ways_are_the_same(tmp_path: Path) -> None:
    loaded = layout.flatten(load_model(LLADA2, quantize="int8").params)
    assert loaded["layers.1.experts.expert_down"].dtype == jnp.int8
    assert loaded["layers.1.experts.expert_down_scale"].shape == (16, 64)
    assert loaded["layers.1.experts.router"].dtype == jnp.float32
    convert(LLADA2, tmp_path / "int8", to="orbax", dtype="keep", overwrite=False, quantize="int8")
    for name, param in layout.flatten(load_model(tmp_path / "int8").params).items():
        np.testing.assert_array_equal(param, loaded[name], err_msg=name)
    whole, integers = (logits(load_model(LLADA2, quantize=kind), TOKENS).argmax(-1) for kind in ("", "int8"))
    assert 0.8 < np.mean(whole == integers) < 1


def test_an_adapter_of_the_attention_and_the_head(tmp_path: Path) -> None:
    """q, k and v have one pair of factors, as they are one matrix; those of an MLP are no part of such an adapter."""
    pairs = drawn(LLADA2, ["query_key_value", "dense", "lm_head"])
    adapter = written(tmp_path / "adapter", named(pairs), lora_alpha=RANK)
    merged = load_model(changed(LLADA2, tmp_path / "merged", pairs, scale=1))
    got, want = (layout.flatten(model.params) for model in (load_model(LLADA2, adapter=adapter), merged))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    mlp = written(tmp_path / "mlp", named(drawn(LLADA2, ["0.mlp.gate_proj"])))
    with pytest.raises(
        UsageError, match=r"factors of this model's matrices, got base_model\.model\.model\.layers\.0\.mlp"
    ):
        load_model(LLADA2, adapter=mlp)


def fields(name: str, **changes: object) -> dict[str, object]:
    values = json.loads((CHECKPOINTS / name / "config.json").read_text()) | changes
    return {field: value for field, value in values.items() if value is not None}


def test_what_the_fields_of_the_releases_mean() -> None:
    tokens: dict[str, object] = {"vocab_size": 157184, "pad_token_id": 156892}
    mini = registry.parse_config(fields("llada2-tiny", **tokens))
    assert (mini.mask_id, mini.eos_id, mini.causal_block, mini.block_causal) == (156895, 156892, 32, True)
    assert (mini.rotary_dim, mini.qk_norm, mini.experts.dense_layers, mini.experts.shared_dim) == (8, True, (0,), 32)
    assert registry.parse_config(fields("llada2-tiny", vocab_size=157184, pad_token_id=None)).eos_id == 156892
    assert registry.parse_config(fields("llada2-tiny")).mask_id is None
    two = registry.parse_config(fields("llada2-tiny-b"))
    assert (two.experts.shared_dim, two.experts.groups, two.qk_norm) == (48, 2, True)
    moe = registry.parse_config(fields("lladamoe-tiny", vocab_size=157184, eos_token_id=156892))
    assert (moe.family, moe.mask_id, moe.causal_block, moe.experts.normalized) == ("llada_moe", 156895, 0, False)
    every_other = registry.parse_config(fields("sdarmoe-tiny", decoder_sparse_step=2))
    assert every_other.experts.dense_layers == (0,)
    assert every_other.stackable
    assert not registry.parse_config(fields("sdarmoe-tiny", mlp_only_layers=[1])).stackable


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("llada2-tiny", {"image_token_offset": 1}, "image_token_offset: expected none, got one of LLaDA2.0-Uni"),
        ("llada2-tiny", {"use_bias": True}, "use_bias: expected False (the releases), got True"),
        ("llada2-tiny", {"n_group": None}, "expected the field(s) n_group, got none"),
        ("llada2-tiny", {"pad_token_id": None}, "expected the field eos_token_id or pad_token_id, got none"),
        ("llada2-tiny", {"n_group": 3}, "expected num_experts 16 to be a multiple of the groups 3"),
        ("llada2-tiny", {"num_experts_per_tok": 9}, "expected 1 to 8 experts per token, those of 2 groups, got 9"),
        ("llada2-tiny", {"first_k_dense_replace": 3}, "expected experts in some of the 3 layers, got none"),
        ("lladamoe-tiny", {"clip_qkv": 8.0}, "clip_qkv: expected None (the releases), got 8.0"),
        ("lladamoe-tiny", {"moe_layer_freq": [1]}, "moe_layer_freq: expected a list of 3 numbers, got [1]"),
        ("lladamoe-tiny", {"num_experts": 0}, "expected the fields of LLaDA (d_model, ...), got hidden_size"),
        ("sdarmoe-tiny", {"moe_intermediate_size": None}, "expected the field(s) moe_intermediate_size, got none"),
        ("sdarmoe-tiny", {"num_experts_per_tok": 17}, "expected 1 to 16 experts per token, got 17"),
    ],
    ids=str,
)
def test_other_variants_are_refused_by_name(name: str, changes: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError) as failure:
        registry.parse_config(fields(name, **changes))
    assert told in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    lost = "model.layers.2.mlp.experts.7.up_proj.weight"
    with pytest.raises(UsageError, match=f"1 missing: {lost}"):
        load_model(with_tensors(LLADA2, tmp_path / "m", lambda edited: edited.pop(lost)))
    folder = copied(LLADA2, tmp_path / "fused")
    name = "model.layers.1.attention.query_key_value.weight"
    short = with_tensors(folder, tmp_path / "short", lambda edited: edited.update({name: edited[name][:-16]}))
    with pytest.raises(UsageError, match=rf"1 wrong shape: {name} \(expected \[128, 64\], got \[112, 64\]\)"):
        load_model(short)
