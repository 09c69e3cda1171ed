"""The training step: what it learns, where its state lives, and that nothing but the seed decides it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from dllm_jax.data.packing import training_batches
from dllm_jax.mesh import make_mesh
from dllm_jax.training.settings import TrainSettings
from dllm_jax.training.trainer import Trainer, TrainState
from tests.training.tiny import LENGTH, SETTINGS, SHAPE, counting


def trainer_on(mesh: Mesh, settings: TrainSettings = SETTINGS, dtype: type = jnp.float32) -> Trainer:
    return Trainer(SHAPE, settings, mesh=mesh, dtype=jnp.dtype(dtype))


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


def test_a_moving_average_is_what_is_exported() -> None:
    trainer = trainer_on(make_mesh(data=1), dataclasses.replace(SETTINGS, ema=0.9))
    state, _ = trained(trainer, 1)
    first = leaf(trainer.init().params, "embedding")
    # The first steps follow faster: decay (1 + 0) / (10 + 0).
    expected = 0.1 * first + 0.9 * leaf(state.params, "embedding")
    assert np.allclose(leaf(trainer.model(state).params, "embedding"), expected, atol=1e-6)


def test_master_weights_stay_in_float32() -> None:
    trainer = trainer_on(make_mesh(data=1), dtype=jnp.bfloat16)
    state, losses = trained(trainer, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert trainer.model(state).dtype == jnp.bfloat16
    assert np.isfinite(losses).all()
