"""The compiled training step on a mesh: parameters, optimizer state and batch all have their sharding fixed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dllm_jax import hosts
from dllm_jax.errors import UsageError
from dllm_jax.memory import placed
from dllm_jax.mesh import TRAINING, batch_multiple, batch_shardings, make_mesh, state_shardings
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.transformer import Transformer, TransformerConfig
from dllm_jax.settings import MeshSettings
from dllm_jax.training.losses import Sums
from dllm_jax.training.settings import TrainSettings

WIDTH = {"embed", "vocab_embed"}  # logical axes as long as the model is wide
MANY = {"layers", "experts"}  # logical axes of matrices that are stored in one array
MUON_RMS = 0.2  # of an update of Muon, beside the learning rate: as those of AdamW are, so that its rates suit
TRAINED, HELD_OUT = 0, 1  # data, for draws
MASTER_DTYPE = jnp.dtype("float32")  # of parameters and moments; the forward runs in the dtype of the diffusion model


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds besides the place in the data."""

    step: Int[Array, ""]  # steps done
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None  # moving average of the parameters, if wanted


class Objective(Protocol):
    """What a model learns from a batch."""

    def prepare(self, batch: Any, key: Array) -> Any:
        """Draws what is random; returns a tree of arrays [B, ...]."""

    def sums(self, module: Transformer, batch: Any) -> Sums:
        """Loss and accuracy of some rows of what `prepare` returned."""


class Adapter(Protocol):
    """Parameters that are trained instead of those of a model, which stay as they are."""

    def init(self) -> nnx.State:
        """The first ones: they change nothing."""

    def merged(self, frozen: nnx.State, params: nnx.State) -> nnx.State:
        """The parameters of the model with the change that the trained ones make."""


class Trainer:
    """Makes the first state and the step that follows each.

    Args:
        config: the model to train.
        settings: of the optimisation.
        mesh: the devices.
        dtype: of the forward and the backward pass.
        objective: what is learnt.
        frozen: with an adapter, the model's parameters, or their shapes; they are split as those of a training are.
        adapter: what is trained instead of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: TrainSettings,
        *,
        mesh: Mesh,
        dtype: jnp.dtype,
        objective: Objective,
        frozen: nnx.State | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.settings, self.mesh, self.dtype = config, settings, mesh, dtype
        self.frozen = None if frozen is None else _split(frozen, mesh)
        self._objective, self._adapter = objective, adapter
        self.schedule = optax.warmup_cosine_decay_schedule(
            0.0, settings.learning_rate, settings.warmup_steps, settings.steps
        )
        self.optimizer = build_optimizer(settings, schedule=self.schedule)
        self.graphdef, _ = abstract_model(config, dtype=MASTER_DTYPE)
        self._trained, _ = abstract_model(dataclasses.replace(config, remat=settings.remat), dtype=MASTER_DTYPE)
        shapes = jax.eval_shape(self._init)
        self.shardings = state_shardings(shapes, mesh, rules=TRAINING)
        self.abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self.shardings
        )
        self.init = jax.jit(self._init, out_shardings=self.shardings)
        self.init_from = jax.jit(self._first, out_shardings=self.shardings)
        self.step_on_mesh = jax.jit(self._step, donate_argnames="state", out_shardings=(self.shardings, None))
        self._sums_on_mesh = jax.jit(self._held_out_sums)
        self._merged_on_mesh = jax.jit(self._whole)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update; the old state is donated. Returns loss, accuracy and norm of the gradient as well."""
        return self.step_on_mesh(state, self._placed(batch), self.frozen)

    def sums(self, state: TrainState, batch: Any, *, number: int = 0) -> Sums:
        """How well the model to be exported predicts a batch.

        Args:
            state: of the training.
            batch: held-out data.
            number: decides what the objective draws.
        """
        return self._sums_on_mesh(self.exported(state), self._placed(batch), self.frozen, number)

    def exported(self, state: TrainState) -> nnx.State:
        """The trained parameters that are measured and exported: the moving average, if there is one."""
        return state.params if state.ema is None else state.ema

    def model(self, state: TrainState) -> Model:
        """The model to be exported, on the mesh."""
        params = self._merged_on_mesh(self.exported(state), self.frozen)
        return Model(config=self.config, graphdef=self.graphdef, params=params, mesh=self.mesh)

    def _init(self) -> TrainState:
        if self._adapter:
            return self._first(self._adapter.init())
        rngs = nnx.Rngs(self.settings.seed)
        return self._first(nnx.state(Transformer(self.config, dtype=MASTER_DTYPE, rngs=rngs)))

    def _first(self, params: nnx.State) -> TrainState:
        """The state before the first step."""
        params = jax.tree.map(lambda p: p.astype(MASTER_DTYPE), params)
        ema = jax.tree.map(jnp.copy, params) if self.settings.ema else None
        return TrainState(step=jnp.int32(0), params=params, opt_state=self.optimizer.init(params), ema=ema)

    def _whole(self, params: nnx.State, frozen: nnx.State | None) -> nnx.State:
        """All parameters of the model in the dtype of the forward."""
        if self._adapter:
            assert frozen is not None, "an adapter needs what it adapts"
            params = self._adapter.merged(frozen, params)
        return jax.tree.map(lambda p: p.astype(self.dtype), params)

    def _held_out_sums(self, params: nnx.State, batch: Any, frozen: nnx.State | None, number: int) -> Sums:
        prepared = self._objective.prepare(batch, self._key(HELD_OUT, number))
        return self._objective.sums(nnx.merge(self.graphdef, self._whole(params, frozen)), prepared)

    def _key(self, what: int, number: Int[Array, ""] | int) -> Array:
        """A key for draws, of the data's kind and the number of a batch."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.settings.seed), what), number)

    def _step(
        self, state: TrainState, batch: Any, frozen: nnx.State | None
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        prepared = self._objective.prepare(batch, self._key(TRAINED, state.step))

        def loss(params: nnx.State, some: Any) -> tuple[Float[Array, ""], Sums]:
            sums = self._objective.sums(nnx.merge(self._trained, self._whole(params, frozen)), some)
            return sums.loss, sums

        def add(total: tuple[nnx.State, Sums], some: Any) -> tuple[tuple[nnx.State, Sums], None]:
            (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, some)
            return jax.tree.map(jnp.add, total, (gradient, sums)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        nothing = Sums(*(jnp.zeros(()) for _ in dataclasses.fields(Sums)))
        (gradient, sums), _ = jax.lax.scan(add, (zeros, nothing), self._parts(prepared))
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), gradient)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else self._average(state.ema, params, state.step)
        metrics = {
            "loss": sums.loss / jnp.maximum(sums.weight, 1),
            "token_accuracy": sums.correct / jnp.maximum(sums.tokens, 1),
            "gradient_norm": optax.tree.norm(gradient),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def _parts(self, batch: Any) -> Any:
        """The rows dealt out to `train.microbatches` parts, [parts, B / parts, ...]; every device keeps its rows."""
        parts = self.settings.microbatches
        return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def _average(self, ema: nnx.State, params: nnx.State, step: Int[Array, ""]) -> nnx.State:
        """The moving average, which follows faster in the first steps."""
        decay = jnp.minimum(self.settings.ema, (1 + step) / (10 + step))
        return optax.incremental_update(params, ema, 1 - decay)

    def _placed(self, batch: Any) -> Any:
        return hosts.place(batch, batch_shardings(batch, self.mesh))


def _split(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Parameters, or their shapes, where the rules of a training have them."""
    shardings = state_shardings(params, mesh, rules=TRAINING)
    if isinstance(jax.tree.leaves(params)[0], jax.Array):
        return jax.jit(lambda x: x, out_shardings=shardings)(params)
    return placed(params, shardings)


def training_mesh(mesh: MeshSettings, settings: TrainSettings, *, devices: Sequence[jax.Device] = ()) -> Mesh:
    """The mesh of a training.

    Args:
        mesh: its axes.
        settings: of the optimisation.
        devices: to choose from; default: those of all processes.

    Raises:
        UsageError: there are not enough devices, or they do not divide the rows that run at once.
    """
    made = make_mesh(**dataclasses.asdict(mesh), batch_size=settings.rows, devices=devices)
    if settings.rows % batch_multiple(made):
        raise UsageError(
            f"train.batch_size: expected a multiple of mesh.data * mesh.fsdp * train.microbatches = "
            f"{batch_multiple(made)} * {settings.microbatches}, got {settings.batch_size}"
        )
    return made


def build_optimizer(settings: TrainSettings, *, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest (arXiv 2502.16982), on gradients of bounded norm.

    Args:
        settings: which of them; without train.clip there is no bound. With AdamW alone norms and biases do not decay;
            of what Muon leaves to it everything does (optax has no mask there).
        schedule: the learning rate of a step.
    """
    if settings.optimizer == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=settings.weight_decay,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=_sides,
            consistent_rms=MUON_RMS,
        )
    else:
        optimizer = optax.adamw(schedule, b2=settings.b2, weight_decay=settings.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity(), optimizer)


def _matrices(params: nnx.State) -> nnx.State:
    """True for every parameter with the model's width as an axis."""
    return _by_axes(params, lambda axes: not WIDTH.isdisjoint(axes))


def _sides(params: nnx.State) -> nnx.State:
    """For Muon, to which a matrix is as its transpose, the axes of the two sides of the layers' matrices; else None."""

    def sides(axes: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        inner = [i for i, axis in enumerate(axes) if axis not in MANY]
        if "embed" not in axes or len(inner) < 2:
            return None
        width = axes.index("embed")
        return optax.contrib.MuonDimensionNumbers((width,), tuple(i for i in inner if i != width))

    return _by_axes(params, sides)


def _by_axes(params: nnx.State, tell: Callable[[tuple[str, ...]], Any]) -> nnx.State:
    """What is told of the logical axes of every parameter, in its place."""
    return jax.tree.map(
        lambda variable: variable.replace(tell(variable.get_metadata()["logical_axes"])),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
