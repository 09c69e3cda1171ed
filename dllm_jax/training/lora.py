"""LoRA (arXiv 2106.09685) for the models of this package: the factors that are trained, and the weights with them.

The factors reparameterise the weights, W + s B A for every chosen matrix, instead of running beside them: so the
network that is trained equals the merged one by construction, on every mesh and with stacked layers, whose weights are
regrouped before they are used.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from dllm_jax.checkpoints import adapters, layout
from dllm_jax.checkpoints.adapters import Factors
from dllm_jax.errors import UsageError
from dllm_jax.mesh import TRAINING, constrain
from dllm_jax.models.transformer import TransformerConfig
from dllm_jax.training.settings import LoraSettings

ALL = "all"
LONG = "embed"  # the logical axis of in and out: split over fsdp in training, and of what decays


def chosen(config: TransformerConfig, targets: str) -> tuple[str, ...]:
    """The matrices of a layer that get factors, in the order of the model.

    Args:
        config: of the model.
        targets: their names in Hugging Face's model, separated by commas; or "all": every matrix of the layers.

    Raises:
        UsageError: a name that no matrix has.
    """
    known = tuple(adapters.modules(config))
    names = [name.strip() for name in targets.split(",")]
    if names == [ALL]:
        return known
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"lora.targets: expected {ALL}, or some of {', '.join(known)}, got {', '.join(unknown)!r}")
    return tuple(name for name in known if name in names)


def init(config: TransformerConfig, *, rank: int, targets: str, seed: int) -> nnx.State:
    """The first factors: A uniform as PEFT draws it (at most 1 / sqrt(in)), B zeros, so that the model is as it was.

    Args:
        config: of the model.
        rank: r, at least 1.
        targets: see `chosen`.
        seed: of A; the other matrices that are chosen do not change one matrix's.

    Returns:
        {module: {"a": [layers, r, in], "b": [layers, out, r]}}, float32, with logical axes as `dllm_jax.mesh` wants.

    Raises:
        UsageError: no such matrix, or a rank below 1.
    """
    if rank < 1:
        raise UsageError(f"lora.rank: expected at least 1, got {rank}")
    names, factors = chosen(config, targets), {}
    for number, (name, matrix) in enumerate(adapters.modules(config).items()):
        if name not in names:
            continue
        outputs, inputs = matrix.shape
        key, bound = jax.random.fold_in(jax.random.key(seed), number), 1 / math.sqrt(inputs)
        a = jax.random.uniform(key, (config.num_layers, rank, inputs), jnp.float32, -bound, bound)
        b = jnp.zeros((config.num_layers, outputs, rank), jnp.float32)
        factors[name] = {
            "a": nnx.Param(a, logical_axes=("layers", "rank", LONG)),
            "b": nnx.Param(b, logical_axes=("layers", LONG, "rank")),
        }
    return nnx.State(factors)


def stacks(factors: nnx.State) -> dict[str, Factors]:
    """The arrays of `init`'s state by module."""
    return {name: Factors(pair["a"].get_value(), pair["b"].get_value()) for name, pair in factors.items()}


def merged(params: nnx.State, factors: nnx.State, config: TransformerConfig, *, scale: float | jax.Array) -> nnx.State:
    """The parameters with the factors merged into them; pure, and differentiable in the factors.

    Args:
        params: of the model as it was; a list of layers or stacked, with copies of key/value heads or without.
        factors: from `init`, on the same mesh.
        config: of the model.
        scale: of every B A: `adapters.scaling`.

    Returns:
        Parameters in the shapes and dtypes of `params`. Products and sums are computed in float32.

    Raises:
        UsageError: the parameters are in 8 bits.
    """
    if config.quantize:
        raise UsageError(f"model.quantize: expected weights that are not quantized for LoRA, got {config.quantize}")
    places = adapters.modules(config)
    by_kind: dict[str, dict[int, Factors]] = {}
    for name, pair in stacks(factors).items():
        whole = Factors(*(constrain(x, None, None, None) for x in pair))  # small: gathered, products stay in place
        by_kind.setdefault(places[name].kind, {})[places[name].place] = whole
    leaves = layout.flatten(params)
    for path, param in nnx.to_flat_state(params):
        name, kind = ".".join(map(str, path)), str(path[-1])
        if path[0] == "layers" and kind in by_kind:
            axes = param.get_metadata()["logical_axes"]
            leaves[name] = _merged_layers(name, leaves[name], by_kind[kind], axes=axes, config=config, scale=scale)
    return layout.unflatten(params, leaves)


def _merged_layers(
    path: str,
    array: jax.Array,
    factors: Mapping[int, Factors],
    *,
    axes: tuple[str, ...],
    config: TransformerConfig,
    scale: float | jax.Array,
) -> jax.Array:
    """One parameter with its factors; of stacked layers one after the other, so that one product is in memory."""
    kind = path.rpartition(".")[2]

    def merge(one: tuple[jax.Array, Mapping[int, Factors]]) -> jax.Array:
        layer, pairs = one
        whole = adapters.merged(layer, kind, pairs, config=config, scale=scale)
        return constrain(whole, *axes[-whole.ndim :], rules=TRAINING)

    if config.stacked:
        return jax.lax.map(merge, (array, dict(factors)))
    number = int(path.split(".")[1])
    return merge((array, jax.tree.map(lambda stack: stack[number], dict(factors))))


@dataclasses.dataclass(frozen=True)
class Lora:
    """The factors as what a `Trainer` trains instead of the weights.

    Args:
        config: of the model.
        settings: rank, scale and which matrices.
        seed: of the first factors.
    """

    config: TransformerConfig
    settings: LoraSettings
    seed: int

    def init(self) -> nnx.State:
        """See the function."""
        return init(self.config, rank=self.settings.rank, targets=self.settings.targets, seed=self.seed)

    def merged(self, frozen: nnx.State, params: nnx.State) -> nnx.State:
        """See the function."""
        scale = adapters.scaling(rank=self.settings.rank, alpha=self.settings.alpha, rslora=False)
        return merged(frozen, params, self.config, scale=scale)


def save(folder: Path, factors: nnx.State, config: TransformerConfig, *, alpha: float, rslora: bool, base: str) -> None:
    """Writes the factors as an adapter in PEFT's layout; see `adapters.save`."""
    adapters.save(folder, stacks(factors), config, alpha=alpha, rslora=rslora, base=base)
