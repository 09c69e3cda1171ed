"""The compiled training step on a mesh: parameters, optimizer state and batch all have their sharding fixed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dllm_jax import hosts
from dllm_jax.data.packing import Batch
from dllm_jax.mesh import TRAINING, batch_shardings, state_shardings
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.transformer import Transformer, TransformerConfig
from dllm_jax.training.losses import AnswerSums, answer_sums
from dllm_jax.training.settings import TrainSettings

WIDTH = {"embed", "vocab_embed"}  # logical axes as long as the model is wide
MASTER_DTYPE = jnp.dtype("float32")  # of parameters and moments; the forward runs in the dtype of the diffusion model


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds besides the place in the data."""

    step: Int[Array, ""]  # steps done
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None  # moving average of the parameters, if wanted


class Trainer:
    """Makes the first state and the step that follows each.

    Args:
        config: the model to train.
        settings: of the optimisation.
        mesh: the devices.
        dtype: of the forward and the backward pass.
    """

    def __init__(self, config: TransformerConfig, settings: TrainSettings, *, mesh: Mesh, dtype: jnp.dtype) -> None:
        self.config, self.settings, self.mesh, self.dtype = config, settings, mesh, dtype
        self.schedule = optax.warmup_cosine_decay_schedule(
            0.0, settings.learning_rate, settings.warmup_steps, settings.steps
        )
        self.optimizer = build_optimizer(settings, schedule=self.schedule)
        self.graphdef, _ = abstract_model(config, dtype=MASTER_DTYPE)
        shapes = jax.eval_shape(self._init)
        self.shardings = state_shardings(shapes, mesh, rules=TRAINING)
        self.abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self.shardings
        )
        self.init = jax.jit(self._init, out_shardings=self.shardings)
        self._step_on_mesh = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, None))
        self._sums_on_mesh = jax.jit(self._sums)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update; the old state is donated. Returns loss, accuracy and norm of the gradient as well."""
        return self._step_on_mesh(state, self._placed(batch))

    def sums(self, state: TrainState, batch: Batch) -> AnswerSums:
        """How well the model to be exported predicts a batch."""
        return self._sums_on_mesh(self.exported(state), self._placed(batch))

    def exported(self, state: TrainState) -> nnx.State:
        """The parameters that are measured and exported: the moving average, if there is one."""
        return state.params if state.ema is None else state.ema

    def model(self, state: TrainState) -> Model:
        """The model to be exported, on the mesh."""
        params = jax.tree.map(lambda p: p.astype(self.dtype), self.exported(state))
        return Model(config=self.config, graphdef=self.graphdef, params=params, mesh=self.mesh)

    def _init(self) -> TrainState:
        params = nnx.state(Transformer(self.config, dtype=MASTER_DTYPE, rngs=nnx.Rngs(self.settings.seed)))
        ema = jax.tree.map(jnp.copy, params) if self.settings.ema else None
        return TrainState(step=jnp.int32(0), params=params, opt_state=self.optimizer.init(params), ema=ema)

    def _sums(self, params: nnx.State, batch: Batch) -> AnswerSums:
        lowered = jax.tree.map(lambda p: p.astype(self.dtype), params)
        return answer_sums(nnx.merge(self.graphdef, lowered), batch)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        def loss(params: nnx.State) -> tuple[Float[Array, ""], AnswerSums]:
            sums = self._sums(params, batch)
            return sums.loss / jnp.maximum(sums.tokens, 1), sums

        (mean, sums), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else self._average(state.ema, params, state.step)
        metrics = {
            "loss": mean,
            "token_accuracy": sums.correct / jnp.maximum(sums.tokens, 1),
            "gradient_norm": optax.tree.norm(gradient),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def _average(self, ema: nnx.State, params: nnx.State, step: Int[Array, ""]) -> nnx.State:
        """The moving average, which follows faster in the first steps."""
        decay = jnp.minimum(self.settings.ema, (1 + step) / (10 + step))
        return optax.incremental_update(params, ema, 1 - decay)

    def _placed(self, batch: Batch) -> Any:
        return hosts.place(batch, batch_shardings(batch, self.mesh))


def build_optimizer(settings: TrainSettings, *, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW behind a bound on the norm of the gradient; norms and biases do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule, b2=settings.b2, weight_decay=settings.weight_decay, mask=_matrices),
    )


def _matrices(params: nnx.State) -> nnx.State:
    """True for every parameter with the model's width as an axis."""
    return jax.tree.map(
        lambda variable: variable.replace(not WIDTH.isdisjoint(variable.get_metadata()["logical_axes"])),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
