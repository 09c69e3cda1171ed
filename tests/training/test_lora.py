"""LoRA factors: where they start, what they make of the weights in every form, that gradients reach them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dllm_jax import api
from dllm_jax.checkpoints import layout, load
from dllm_jax.checkpoints.adapters import scaling
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from dllm_jax.mesh import TRAINING, make_mesh, state_shardings
from dllm_jax.models import registry
from dllm_jax.models.model import Model, computing
from dllm_jax.training import lora
from tests.checkpoints.folders import GQA, TINY, in_dtype, one_layer, tensors
from tests.traces import GOLDENS

DREAM = GOLDENS / "checkpoints" / "dream-tiny"
RANK, SCALE = 4, 1.5
MODULES = {
    TINY: ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    DREAM: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TOKENS = np.arange(12).reshape(2, 6)


def drawn(model: Model, targets: str = "all") -> nnx.State:
    """Factors of which both are random."""
    leaves, structure = jax.tree.flatten(lora.init(model.config, rank=RANK, targets=targets, seed=0))
    random = np.random.default_rng(0)
    values = [jnp.asarray(random.standard_normal(leaf.shape, np.float32) / 8) for leaf in leaves]
    return jax.tree.unflatten(structure, values)


def merged(model: Model, factors: nnx.State) -> Model:
    with computing(model.mesh):
        params = jax.jit(lora.merged, static_argnums=2)(model.params, factors, model.config, scale=SCALE)
    return dataclasses.replace(model, params=params)


def arrays(model: Model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in layout.flatten(model.params).items()}


@pytest.mark.parametrize("folder", [TINY, DREAM], ids=lambda folder: folder.name)
def test_every_tensor_is_that_of_the_definition(folder: Path) -> None:
    """In Hugging Face's layout: W + scale * B A in numpy."""
    model = load_model(folder)
    factors = drawn(model)
    assert {*factors} == {*MODULES[folder]}
    names = registry.tensor_names(model.config)
    got = {
        name: tensor
        for path, leaf in arrays(merged(model, factors)).items()
        for name, tensor in zip(names[path], layout.split(path, leaf), strict=True)
    }
    changed = 0
    for name, tensor in tensors(folder).items():
        want, parts = tensor.astype(np.float32), name.split(".")
        layers = [int(part) for part in parts if part.isdecimal()]
        if layers and parts[-1] == "weight" and parts[-2] in MODULES[folder]:
            a, b = (np.asarray(factors[parts[-2]][letter][...])[layers[0]] for letter in "ab")
            want, changed = want + SCALE * (b @ a), changed + 1
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)
    assert changed == 7 * model.config.num_layers


@pytest.mark.parametrize(
    ("stacked", "tensor", "dtype"),
    [(False, 1, "float32"), (False, 4, "bfloat16"), (True, 1, "bfloat16"), (True, 4, "float32")],
)
def test_every_form_is_what_is_loaded_with_the_adapter(
    stacked: bool, tensor: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some matrices; on four devices two key/value heads have copies."""
    tuned, form = load.tuned, {"stacked": stacked}
    monkeypatch.setattr(load, "tuned", lambda *args, **kwargs: dataclasses.replace(tuned(*args, **kwargs), **form))
    mesh = make_mesh(fsdp=8 // tensor, tensor=tensor)
    folder = in_dtype(GQA, tmp_path / "model", dtype)
    model = load_model(folder, dtype=dtype, mesh=mesh)
    assert (model.config.kv_copies, model.config.stacked) == (2 if tensor == 4 else 1, stacked)
    factors = drawn(model, "k_proj, q_proj,attn_out,up_proj")
    lora.save(tmp_path, factors, model.config, alpha=SCALE * RANK, rslora=False, base="x")
    want = arrays(load_model(folder, dtype=dtype, mesh=mesh, adapter=tmp_path))
    got = arrays(merged(model, factors))
    assert got.keys() == want.keys()
    tolerance = 1e-6 if dtype == "float32" else 2**-7  # sums of products may differ in a last bit
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype
        one, other = got[path].astype(np.float32), leaf.astype(np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-6, err_msg=path)
        assert (one == other).mean() > 0.99 or dtype == "float32"


def test_logits_of_a_saved_adapter(tmp_path: Path) -> None:
    model = load_model(DREAM)
    factors = drawn(model)
    lora.save(tmp_path, factors, model.config, alpha=SCALE * RANK**0.5, rslora=True, base="x")
    want = api.logits(merged(model, factors), TOKENS)
    got = api.logits(load_model(DREAM, adapter=tmp_path), TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - api.logits(model, TOKENS)).max() > 0.1


def test_at_first_nothing_changes() -> None:
    model = load_model(TINY, dtype="bfloat16")
    factors = lora.init(model.config, rank=RANK, targets="all", seed=3)
    before, after = arrays(model), arrays(merged(model, factors))
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    a = np.asarray(factors["ff_out"]["a"][...])
    assert a.shape == (model.config.num_layers, RANK, model.config.mlp_dim)
    bound = model.config.mlp_dim**-0.5
    assert 0.95 * bound < np.abs(a).max() <= bound
    assert abs(a.std() / bound * 3**0.5 - 1) < 0.05  # of a uniform draw
    assert len({a[0].tobytes(), a[1].tobytes(), np.asarray(factors["q_proj"]["a"][...])[0].tobytes()}) == 3


def test_a_matrix_starts_alike_whatever_else_is_chosen() -> None:
    config = load_model(TINY).config
    some = lora.init(config, rank=RANK, targets="up_proj,v_proj", seed=1)
    every = lora.init(config, rank=RANK, targets="all", seed=1)
    assert tuple(lora.stacks(some)) == ("v_proj", "up_proj")
    np.testing.assert_array_equal(some["up_proj"]["a"][...], every["up_proj"]["a"][...])
    other = lora.init(config, rank=RANK, targets="up_proj", seed=2)
    assert not np.array_equal(some["up_proj"]["a"][...], other["up_proj"]["a"][...])


def slopes(model: Model) -> Callable[[nnx.State], tuple[jax.Array, nnx.State]]:
    """The mean of squared logits, and its gradient, as a function of the factors."""

    def loss(factors: nnx.State) -> jax.Array:
        params = lora.merged(model.params, factors, model.config, scale=SCALE)
        return jnp.mean(jnp.square(api._logits(model.graphdef, params, TOKENS, np.ones((2, 6), bool))))

    return jax.jit(jax.value_and_grad(loss))


def test_gradients_reach_both_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of finite differences; on a mesh, with stacked layers and copied heads, the same."""
    folder = one_layer(GQA, tmp_path)
    model = load_model(folder)
    factors = drawn(model, "q_proj,v_proj,attn_out,ff_out")
    run = slopes(model)
    leaves, structure = jax.tree.flatten(factors)
    whole = [np.asarray(leaf) for leaf in jax.tree.leaves(run(factors)[1])]
    for number, slope in enumerate(whole):
        assert slope.dtype == np.float32
        step = 1e-2 * slope / np.linalg.norm(slope)
        moved = ([leaf + sign * step if i == number else leaf for i, leaf in enumerate(leaves)] for sign in (1, -1))
        ahead, behind = (float(run(jax.tree.unflatten(structure, values))[0]) for values in moved)
        np.testing.assert_allclose((ahead - behind) / 2e-2, np.linalg.norm(slope), rtol=2e-2)
    tuned, form = load.tuned, {"stacked": True}
    monkeypatch.setattr(load, "tuned", lambda *args, **kwargs: dataclasses.replace(tuned(*args, **kwargs), **form))
    model = load_model(folder, mesh=make_mesh(fsdp=2, tensor=4))
    with computing(model.mesh):
        split = jax.tree.leaves(slopes(model)(factors)[1])
    for one, other in zip(split, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_factors_are_split_over_fsdp() -> None:
    config, mesh = load_model(TINY).config, make_mesh(fsdp=4, tensor=2)

    def init() -> nnx.State:
        return lora.init(config, rank=RANK, targets="all", seed=0)

    shardings = state_shardings(jax.eval_shape(init), mesh, rules=TRAINING)
    placed, alone = jax.jit(init, out_shardings=shardings)(), init()
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(alone), strict=True):
        assert one.addressable_shards[0].data.size * 4 == one.size
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("o_proj", r"lora\.targets: expected all, or some of q_proj, .*, ff_out, got 'o_proj'"),
        ("q_proj,wte,x", r"got 'wte, x'"),
        ("", r"got ''"),
        ("all,q_proj", r"got 'all'"),
    ],
)
def test_unknown_targets_are_named(targets: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        lora.init(load_model(TINY).config, rank=1, targets=targets, seed=0)


def test_what_is_refused() -> None:
    model = load_model(GQA, quantize="int8")
    with pytest.raises(UsageError, match=r"lora\.rank: expected at least 1, got 0"):
        lora.init(model.config, rank=0, targets="all", seed=0)
    with pytest.raises(UsageError, match=r"model\.quantize: expected weights that are not quantized.*, got int8"):
        lora.merged(model.params, drawn(model), model.config, scale=1)


def test_scaling() -> None:
    assert scaling(rank=16, alpha=8, rslora=False) == 0.5
    assert scaling(rank=16, alpha=8, rslora=True) == 2
