"""The fit of a filter (Learn2PD, arXiv 2509.25188, section 3.2): full batch, early stopping, exact continuation."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from dllm_jax import hosts
from dllm_jax.checkpoints.filters import Filter, from_arrays, to_arrays
from dllm_jax.checkpoints.store import TrainingCheckpoints
from dllm_jax.errors import UsageError
from dllm_jax.models.filter import ConfidenceFilter, FilterConfig
from dllm_jax.training.filter.config import FitSettings
from dllm_jax.training.filter.records import Records
from dllm_jax.training.report import Reporter
from dllm_jax.training.run import RunFolder


class Measured(NamedTuple):
    """The losses after an epoch, both with the same parameters."""

    epoch: int
    training_loss: float
    validation_loss: float


class Fitted(NamedTuple):
    """The outcome of a fit."""

    filter: Filter  # the parameters of the lowest validation loss that was measured
    best_epoch: int  # when that was
    history: list[Measured]


class Examples(NamedTuple):
    """Records as the loss takes them, on the device."""

    confidence_RQ: Float[Array, "R Q"]
    correct_RQ: Float[Array, "R Q"]  # 1 or 0
    weight_RQ: Float[Array, "R Q"]  # 1 where the loss counts, 0 elsewhere


@struct.dataclass
class FitState:
    """Everything that decides the rest of a fit."""

    epoch: Int[Array, ""]  # epochs done
    params: nnx.State
    opt_state: optax.OptState
    best_epoch: Int[Array, ""]
    best_loss: Float[Array, ""]
    best_params: nnx.State


class Fitter:
    """Makes the first state and the one some epochs later.

    Args:
        network: the filter.
        settings: of the optimisation.
    """

    def __init__(self, network: FilterConfig, settings: FitSettings) -> None:
        self.network, self.settings = network, settings
        self.optimizer = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
        self.graphdef = nnx.graphdef(self._module())
        # Several processes all fit the same, on all their devices.
        self._sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P()) if hosts.several() else None
        self.init = jax.jit(self._init, out_shardings=self._sharding)
        self.advance = jax.jit(self._advance, donate_argnums=0, out_shardings=self._sharding)

    @property
    def abstract(self) -> FitState:
        """Shapes, dtypes and the one device of a state, or all of several processes."""
        device = self._sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(self._init)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)

    def _module(self) -> ConfidenceFilter:
        return ConfidenceFilter(self.network, rngs=nnx.Rngs(self.settings.seed))

    def _init(self) -> FitState:
        params = nnx.state(self._module())
        return FitState(
            epoch=jnp.int32(0),
            params=params,
            opt_state=self.optimizer.init(params),
            best_epoch=jnp.int32(0),
            best_loss=jnp.float32(jnp.inf),
            best_params=jax.tree.map(jnp.copy, params),
        )

    def _advance(
        self, state: FitState, training: Examples, validation: Examples, epochs: Int[Array, ""]
    ) -> tuple[FitState, tuple[Float[Array, ""], Float[Array, ""]]]:
        """Some epochs, then the losses; the old state is donated."""
        loss = functools.partial(mean_loss, self.graphdef)

        def epoch(_: Int[Array, ""], carry: tuple[nnx.State, optax.OptState]) -> tuple[nnx.State, optax.OptState]:
            params, opt_state = carry
            updates, opt_state = self.optimizer.update(jax.grad(loss)(params, training), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.lax.fori_loop(0, epochs, epoch, (state.params, state.opt_state))
        losses = loss(params, training), loss(params, validation)
        done, better = state.epoch + epochs, losses[1] < state.best_loss

        def best(new: Any, old: Any) -> Any:
            return jax.tree.map(functools.partial(jnp.where, better), new, old)

        after = FitState(
            epoch=done,
            params=params,
            opt_state=opt_state,
            best_epoch=best(done, state.best_epoch),
            best_loss=best(losses[1], state.best_loss),
            best_params=best(params, state.best_params),
        )
        return after, losses


def fit(
    training: Records, validation: Records, *, network: FilterConfig, settings: FitSettings, run: RunFolder
) -> Fitted:
    """Fits a filter until the loss on the validation records has stopped to fall.

    An interrupted fit that is started again ends with the same parameters, bit for bit, as if it had not been.

    Args:
        training: what is learnt.
        validation: what decides when to stop and which parameters are the best.
        network: the filter, of the records' block length.
        settings: of the optimisation.
        run: the folder of checkpoints and metrics; open.

    Returns:
        The best filter and how the losses went.

    Raises:
        UsageError: there is no position to learn from or to measure on, or the loss is never finite.
    """
    parts = [
        with_cuts(examples(records, positions=settings.positions), copies=settings.cut_copies, seed=settings.seed)
        for records in (training, validation)
    ]
    fitter = Fitter(network, settings)
    with contextlib.closing(TrainingCheckpoints(run.checkpoints)) as checkpoints:
        state, history = fitter.init(), list[Measured]()
        if checkpoints.latest() is not None:
            state, kept = checkpoints.restore(fitter.abstract)
            history = [Measured(*entry) for entry in kept["history"]]
        with Reporter(run.folder, start=int(state.epoch), steps=settings.epochs) as report:
            while not _is_over(state, settings):
                epochs = min(settings.eval_every, settings.epochs - int(state.epoch))
                state, losses = fitter.advance(state, *parts, epochs)
                measured = Measured(int(state.epoch), *map(float, losses))
                history.append(measured)
                keep = measured.epoch % settings.checkpoint_every == 0 or _is_over(state, settings)
                report.advance(epochs)
                report.write(measured.epoch, {"loss": measured.training_loss}, group="train", aloud=keep)
                report.write(measured.epoch, {"loss": measured.validation_loss}, group="held_out", aloud=keep)
                if keep:
                    checkpoints.save(measured.epoch, state, iterator={"history": [list(entry) for entry in history]})
    if not int(state.best_epoch):
        raise UsageError(f"fit.learning_rate: expected one whose loss stays finite, got {settings.learning_rate}")
    # Through the host: what a checkpoint restored is tied to one device, where a model may be on many.
    return Fitted(from_arrays(to_arrays(state.best_params)), int(state.best_epoch), history)


def examples(records: Records, *, positions: str) -> Examples:
    """Records on the device.

    Args:
        records: the records.
        positions: which positions the loss counts, as `FitSettings.positions`.

    Raises:
        UsageError: it counts none.
    """
    counted_RQ = records.masked_RQ if positions == "masked" else np.ones_like(records.masked_RQ)
    if not counted_RQ.any():
        raise UsageError(f"fit.positions: expected records with positions to count ({positions}), got none")
    arrays = (records.confidence_RQ, records.correct_RQ, counted_RQ)
    return Examples(*(jnp.asarray(array, jnp.float32) for array in arrays))


def with_cuts(examples: Examples, *, copies: int, seed: int) -> Examples:
    """The examples, and copies of them as a filter sees a block that ends early: zeros from a random position on.

    Without them a filter knows confident tails only, and accepts too much in a block whose tail was cut.

    Args:
        examples: of whole blocks.
        copies: of every example, each with a cut of its own; the loss counts nothing behind it.
        seed: of the cuts.
    """
    size, block_length = examples.confidence_RQ.shape
    cut_CR = np.random.default_rng(seed).integers(1, block_length, (copies, size), endpoint=True)
    is_left_CRQ = np.arange(block_length)[None, None, :] < cut_CR[:, :, None]
    parts = [examples]
    for is_left_RQ in jnp.asarray(is_left_CRQ, jnp.float32):
        parts.append(
            Examples(examples.confidence_RQ * is_left_RQ, examples.correct_RQ, examples.weight_RQ * is_left_RQ)
        )
    return Examples(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def mean_loss(graphdef: Any, params: nnx.State, examples: Examples) -> Float[Array, ""]:
    """The binary cross-entropy, in nats, averaged over the positions that count."""
    logits_RQ = nnx.merge(graphdef, params)(examples.confidence_RQ)
    loss_RQ = optax.sigmoid_binary_cross_entropy(logits_RQ, examples.correct_RQ)
    return jnp.sum(loss_RQ * examples.weight_RQ) / jnp.sum(examples.weight_RQ)


def _is_over(state: FitState, settings: FitSettings) -> bool:
    epoch = int(state.epoch)
    return epoch >= settings.epochs or epoch - int(state.best_epoch) >= settings.patience
