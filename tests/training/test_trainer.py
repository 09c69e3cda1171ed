"""The training step: what it learns, where its state lives, and that nothing but the seed decides it."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from dllm_jax.checkpoints import layout
from dllm_jax.data.packing import Batch, Example, held_out_batches, training_batches
from dllm_jax.mesh import batch_shardings, make_mesh
from dllm_jax.models.model import computing
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.training.losses import NextTokens
from dllm_jax.training.settings import TrainSettings
from dllm_jax.training.trainer import Trainer, TrainState
from tests.training.tiny import LENGTH, SETTINGS, SHAPE, counting

DEEP = dataclasses.replace(SHAPE, num_layers=4, embed_dim=64, mlp_dim=256, head_dim=16)


def trainer_on(
    mesh: Mesh, settings: TrainSettings = SETTINGS, dtype: type = jnp.float32, *, shape: TransformerConfig = SHAPE
) -> Trainer:
    return Trainer(shape, settings, mesh=mesh, dtype=jnp.dtype(dtype), objective=NextTokens())


def trained(trainer: Trainer, steps: int) -> tuple[TrainState, list[float]]:
    """The state after some steps on numbers to count, and the loss of each."""
    batches = training_batches(counting(100), length=LENGTH, batch_size=8, seed=trainer.settings.seed)
    state, losses = trainer.init(), []
    for _ in range(steps):
        state, metrics = trainer.step(state, next(batches))
        losses.append(float(metrics["loss"]))
    return state, losses


def leaves(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same_bits(one: TrainState, other: TrainState) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(scope="module")
def single() -> Trainer:
    return trainer_on(make_mesh(data=1))


def test_it_learns_to_count(single: Trainer) -> None:
    state, losses = trained(single, 80)
    assert losses[0] == pytest.approx(np.log(64), abs=0.2)
    assert losses[-1] < 0.4 * losses[0]
    assert int(state.step) == 80


def test_the_seed_decides_everything(single: Trainer) -> None:
    first = trained(single, 3)[0]
    assert same_bits(first, trained(single, 3)[0])
    other = trainer_on(make_mesh(data=1), dataclasses.replace(SETTINGS, seed=1))
    assert not same_bits(first, trained(other, 3)[0])


def test_state_and_batch_are_split_over_the_mesh(single: Trainer) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, losses = trained(trainer_on(mesh), 3)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for tree in (state.params, adam.mu, adam.nu):
        for path in ("embedding", "layers.0.mlp.gate_up", "layers.0.mlp.down", "layers.0.attention.qkv"):
            array = leaf(tree, path)
            assert array.addressable_shards[0].data.size == array.size // 4, path
            assert array.sharding == leaf(state.params, path).sharding
    assert np.allclose(losses, trained(single, 3)[1], atol=1e-5)


def leaf(tree: nnx.State, path: str) -> jax.Array:
    flat = {".".join(map(str, place)): value for place, value in nnx.to_flat_state(tree)}
    return flat[path].get_value()


def test_norms_and_biases_do_not_decay() -> None:
    settings = dataclasses.replace(SETTINGS, weight_decay=5.0, warmup_steps=0)
    trainer = trainer_on(make_mesh(data=1), settings)
    before = trainer.init()
    zero = jax.tree.map(jnp.zeros_like, before.params)
    updates, _ = jax.jit(trainer.optimizer.update)(zero, before.opt_state, before.params)
    assert np.all(leaf(updates, "final_norm.scale") == 0)
    assert np.all(leaf(updates, "layers.0.attention.qkv_bias") == 0)
    assert np.allclose(leaf(updates, "embedding"), -0.1 * leaf(before.params, "embedding"))


@pytest.mark.parametrize("stacked", [False, True])
def test_muon_stretches_no_direction_of_the_layers_matrices(stacked: bool) -> None:
    shape = dataclasses.replace(SHAPE, num_layers=2, stacked=stacked)
    settings = dataclasses.replace(SETTINGS, optimizer="muon", weight_decay=0.0, warmup_steps=0)
    trainer = trainer_on(make_mesh(data=1), settings, shape=shape)
    state, draw = trainer.init(), np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), state.params)
    updates, _ = jax.jit(trainer.optimizer.update)(gradient, state.opt_state, state.params)
    matrices = [
        np.moveaxis(np.asarray(part), place, 0).reshape(SHAPE.embed_dim, -1)
        for _, update in nnx.to_flat_state(updates)
        if "embed" in (axes := update.get_metadata()["logical_axes"])
        for place in [[axis for axis in axes if axis != "layers"].index("embed")]
        for part in (update[...] if stacked else update[...][None])
    ]
    assert len(matrices) == 2 * 4
    for matrix in matrices:
        stretch = np.linalg.svd(matrix, compute_uv=False) / (2e-2 * 0.2 * max(matrix.shape) ** 0.5)
        assert stretch.max() < 1.3
        assert np.median(stretch) > 0.7
    assert np.ptp(np.abs(leaf(updates, "final_norm.scale"))) < 1e-5  # Adam's first one has one size everywhere


def test_a_moving_average_is_what_is_exported() -> None:
    trainer = trainer_on(make_mesh(data=1), dataclasses.replace(SETTINGS, ema=0.9))
    state, _ = trained(trainer, 1)
    first = leaf(trainer.init().params, "embedding")
    # The first steps follow faster: decay (1 + 0) / (10 + 0).
    expected = 0.1 * first + 0.9 * leaf(state.params, "embedding")
    assert np.allclose(leaf(trainer.model(state).params, "embedding"), expected, atol=1e-6)


def test_without_a_bound_gradients_are_as_they_are() -> None:
    batch = uneven()
    assert_close(updated(batch, clip=0.0), updated(batch, clip=1e9))


def test_master_weights_stay_in_float32() -> None:
    trainer = trainer_on(make_mesh(data=1), dtype=jnp.bfloat16)
    state, losses = trained(trainer, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert trainer.model(state).dtype == jnp.bfloat16
    assert np.isfinite(losses).all()


def updated(batch: Batch, shape: TransformerConfig = SHAPE, **settings: Any) -> dict[str, np.ndarray]:
    """What a first step makes of everything: its moments are the gradient in numbers that tell it apart."""
    given = {"warmup_steps": 0, "clip": 1e9, **settings}
    trainer = trainer_on(make_mesh(data=1), dataclasses.replace(SETTINGS, **given), shape=shape)
    state, metrics = trainer.step(trainer.init(), batch)
    moments = optax.tree.get(state.opt_state, "mu")
    return {name: np.asarray(value) for name, value in (layout.flatten(moments) | metrics).items()}


def uneven() -> Batch:
    """Eight rows, of which one is empty and the others have 1 to 7 tokens that count."""
    examples = [Example(np.arange(i, i + LENGTH, dtype=np.int32), LENGTH - i) for i in range(1, 8)]
    (batch,) = held_out_batches(examples, length=LENGTH, batch_size=8)
    assert sorted(batch.is_answer_BT.sum(axis=1)) == list(range(8))
    return batch


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_parts_of_a_batch_give_the_gradient_of_the_whole() -> None:
    batch = uneven()
    whole = updated(batch)
    assert whole["gradient_norm"] > 0.01
    for parts in (2, 8):
        assert_close(whole, updated(batch, microbatches=parts))


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_that_are_computed_again_give_the_same_gradient(stacked: bool) -> None:
    batch, shape = uneven(), dataclasses.replace(SHAPE, num_layers=2, stacked=stacked)
    assert_close(updated(batch, shape), updated(batch, shape, remat=True))


def planned(*, fsdp: int = 1, remat: bool = False, stacked: bool = True) -> tuple[int, int]:
    """Bytes on a device that a step's arguments take, and its temporaries, as the compiler plans them."""
    settings = dataclasses.replace(SETTINGS, batch_size=16, remat=remat)
    mesh = make_mesh(data=1, fsdp=fsdp)
    trainer = trainer_on(mesh, settings, shape=dataclasses.replace(DEEP, stacked=stacked))
    batch = next(training_batches(counting(100), length=LENGTH, batch_size=16, seed=0))
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        batch,
        batch_shardings(batch, mesh),
    )
    with computing(mesh):
        plan = trainer.step_on_mesh.lower(trainer.abstract, shapes, None).compile().memory_analysis()
    assert plan.alias_size_in_bytes > 0.9 * plan.output_size_in_bytes  # the state is updated in place
    return plan.argument_size_in_bytes, plan.temp_size_in_bytes


def test_more_devices_of_fsdp_hold_less_each() -> None:
    plans = [planned(fsdp=fsdp) for fsdp in (1, 2, 4, 8)]
    for (more, behind), (less, ahead) in itertools.pairwise(plans):
        assert less < 0.6 * more
        assert less + ahead < 0.8 * (more + behind)


@pytest.mark.parametrize(("stacked", "most"), [(False, 0.95), (True, 0.8)])
def test_computing_layers_again_takes_less_memory(stacked: bool, most: float) -> None:
    """Of a list the compiler for CPUs drops the barriers, and keeps much of what should be computed again."""
    kept, again = (planned(remat=remat, stacked=stacked)[1] for remat in (False, True))
    assert again < most * kept
