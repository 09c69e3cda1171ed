"""LoRA adapters (arXiv 2106.09685): changes of low rank to a model's matrices, in folders as PEFT writes them.

For a matrix W [out, in] an adapter has A [r, in] and B [out, r], and the model computes with W + s B A, where s is
alpha / r, or alpha / sqrt(r) with `use_rslora`. Here an adapter is merged into the weights while they are read: sums in
float32, then the dtype (or the 8 bits) of the model, so a decode costs what it costs without one.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from dllm_jax import hosts, remote
from dllm_jax.checkpoints import elsewhere, files, foreign, hf, layout
from dllm_jax.errors import UsageError
from dllm_jax.models.transformer import TransformerConfig

CONFIG, WEIGHTS = files.ADAPTER, "adapter_model.safetensors"
PREFIX, FACTORS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")  # PEFT's, around the name of a matrix

# Fields of the configuration that would change what is computed, or which tensors there are.
_UNUSED = (
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the weights of the model too


class Matrix(NamedTuple):
    """A matrix that can have factors."""

    path: str  # of the parameter that holds it: "layers.0.attention.qkv"
    place: int  # among the tensors of the parameter
    shape: tuple[int, int]  # [out, in]

    @property
    def kind(self) -> str:
        """The last part of the parameter's name."""
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to; None: the head."""
        first, layer, *_ = *self.path.split("."), ""
        return int(layer) if first == "layers" else None


class Factors(NamedTuple):
    """What is learnt of one matrix."""

    a: Any  # A [r, in]
    b: Any  # B [out, r]


@functools.cache
def matrices(config: TransformerConfig) -> dict[str, Matrix]:
    """The matrices of a model by their Hugging Face names, without ".weight"; of one with experts not the MLPs'."""
    kinds = [kind for kind in layout.JOINABLE if not (config.experts and kind in ("gate_up", "down"))]
    return {
        name.removesuffix(".weight"): Matrix(path, place, (shape[0], shape[1]))
        for path, tensors in hf.expected_tensors(config).items()
        if path.rpartition(".")[2] in kinds
        for place, (name, shape) in enumerate(tensors.items())
    }


def modules(config: TransformerConfig) -> dict[str, Matrix]:
    """The matrices of the first layer, which all layers have, by the last part of their names: "q_proj", ..."""
    return {name.rpartition(".")[2]: matrix for name, matrix in matrices(config).items() if matrix.layer == 0}


def scaling(*, rank: int, alpha: float, rslora: bool) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) for a rank-stabilised adapter (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def merged(
    array: jax.Array,
    kind: str,
    factors: Mapping[int, Factors],
    *,
    config: TransformerConfig,
    scale: float | jax.Array,
) -> jax.Array:
    """A parameter of one layer, or the head, with its factors merged into it, inside a program.

    Args:
        array: as it is stored, or with the copies and in the order of `config`'s layers.
        kind: the last part of its name.
        factors: by the place of their matrix among the parameter's tensors.
        config: of the model.
        scale: of every product B A.

    Returns:
        What has the array's shape and dtype; the products and the sum are computed in float32.
    """
    shapes = {matrix.place: matrix.shape for matrix in matrices(config).values() if matrix.kind == kind}
    products = [
        scale * jnp.matmul(*(x.astype(jnp.float32) for x in (factors[place].b, factors[place].a)), precision="highest")
        if place in factors
        else jnp.zeros(shape, jnp.float32)
        for place, shape in sorted(shapes.items())
    ]
    change = layout.joined(kind, products, config)
    change = layout.spread(kind, change, groups=config.stored_groups, copies=config.kv_copies)
    change = layout.stacked(kind, change) if config.stacked else change
    return (array.astype(jnp.promote_types(array.dtype, jnp.float32)) + change).astype(array.dtype)


class Adapter(NamedTuple):
    """An adapter whose factors are not read yet."""

    scale: float
    factors: dict[str, dict[int, Factors]]  # of tensors, by parameter and place
    config: TransformerConfig  # of the stored parameters

    def before(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """How to read the parameters that are wanted: those that have factors in at least float32."""
        return {
            path: shape.update(dtype=jnp.promote_types(shape.dtype, jnp.float32)) if path in self.factors else shape
            for path, shape in wanted.items()
        }

    def merging(
        self, params: Iterable[tuple[str, jax.Array]], wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Iterator[tuple[str, jax.Array]]:
        """The parameters with their factors merged, one after the other.

        Args:
            params: by path, as `before` says.
            wanted: shapes, dtypes and shardings of the results.
        """
        for path, array in params:
            if path not in self.factors:
                yield path, array
                continue
            factors = {
                place: Factors(*(np.asarray(tensor.map(), np.float32) for tensor in pair))
                for place, pair in self.factors[path].items()
            }
            kind, dtype, place = path.rpartition(".")[2], wanted[path].dtype, wanted[path].sharding
            whole = NamedSharding(place.mesh, PartitionSpec())
            factors = hosts.place(factors, jax.tree.map(lambda _, whole=whole: whole, factors))
            yield path, _merge(array, factors, self.scale, kind=kind, config=self.config, dtype=dtype, place=place)


@functools.partial(jax.jit, static_argnames=("kind", "config", "dtype", "place"))
def _merge(
    array: jax.Array,
    factors: dict[int, Factors],
    scale: jax.Array,
    *,
    kind: str,
    config: TransformerConfig,
    dtype: np.dtype,
    place: NamedSharding,
) -> jax.Array:
    whole = merged(array, kind, factors, config=config, scale=scale)
    return jax.lax.with_sharding_constraint(whole.astype(dtype), place)


def resolve(path: str | Path, *, field: str = "model.adapter") -> Path:
    """The folder of an adapter.

    Args:
        path: what the user gave; may be a URL, or a folder of Hugging Face's cache, whose snapshot is the result.
        field: the setting it came from, for the error.

    Raises:
        UsageError: there is no folder, or one with stand-ins for files.
    """
    if remote.is_remote(path) and not foreign.hint(str(path)):
        path = elsewhere.copied(str(path), field=field)
    if not Path(path).is_dir():
        raise UsageError(f"{field}: expected the folder of an adapter, got {str(path)!r}{foreign.hint(str(path))}")
    folder = foreign.snapshot(Path(path), field=field)
    foreign.refuse_stand_ins(folder, field=field)
    return folder


def open_adapter(folder: Path, config: TransformerConfig) -> Adapter:
    """Reads what an adapter says of itself, and whether it belongs to a model; none of its factors.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: of the model as it is stored, in which it is settled whether the head is the embedding.

    Raises:
        UsageError: it is no LoRA adapter, one of a kind that is not built, or not one of this model.
    """
    rank, scale = _read_config(folder)
    if config.quantize:
        raise UsageError(
            f"{folder}: expected a model in whole precision for an adapter, got one in {config.quantize} "
            "(convert the original with --adapter and --quantize)"
        )
    if not (folder / WEIGHTS).is_file():
        raise foreign.absent(folder, WEIGHTS)
    return Adapter(scale, _read_factors(folder / WEIGHTS, config, rank=rank), config)


def _read_config(folder: Path) -> tuple[int, float]:
    """Rank and scale."""
    path = folder / CONFIG
    if not path.is_file() and (folder / "config.json").is_file():
        raise UsageError(f"{folder}: expected an adapter with {CONFIG}, got a model")
    if not path.is_file():
        raise foreign.absent(folder, CONFIG)
    fields = files.read_json(path)
    if fields.get("peft_type") != "LORA":
        raise UsageError(f"{path} field peft_type: expected 'LORA', got {fields.get('peft_type')!r}")
    for name in _UNUSED:
        if (value := fields.get(name)) and value != "none":
            raise UsageError(f"{path} field {name}: expected none, got {value!r}")
    if (init := fields.get("init_lora_weights")) not in _INITS:
        raise UsageError(
            f"{path} field init_lora_weights: expected one that leaves the model as it is, got {init!r} "
            "(in peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank, alpha, rslora = (fields.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if type(rank) is not int or rank < 1:
        raise UsageError(f"{path} field r: expected a positive whole number, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UsageError(f"{path} field lora_alpha: expected a number, got {alpha!r}")
    if rslora not in (None, True, False):
        raise UsageError(f"{path} field use_rslora: expected true or false, got {rslora!r}")
    return rank, scaling(rank=rank, alpha=alpha, rslora=bool(rslora))


def _read_factors(path: Path, config: TransformerConfig, *, rank: int) -> dict[str, dict[int, Factors]]:
    """The tensors of the factors by parameter and place, all of the right shapes."""
    found = hf.read_header(path)
    named = {name: tuple(PREFIX + name + suffix for suffix in FACTORS) for name in matrices(config)}
    known = {tensor for pair in named.values() for tensor in pair}
    if unknown := [name for name in found if name not in known]:
        raise UsageError(f"{path}: expected factors of this model's matrices, got {files.abbreviate(unknown)}")
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in found.items() if tensor.dtype not in hf.DTYPES]:
        raise UsageError(f"{path}: expected tensors in {', '.join(hf.DTYPES)}, got {files.abbreviate(odd)}")
    alone = [name for pair in named.values() for name in pair if name in found and not all(x in found for x in pair)]
    if alone or not found:
        told = f"one of them only: {files.abbreviate(alone)}" if alone else "no tensors"
        raise UsageError(f"{path}: expected lora_A and lora_B of every matrix, got {told}")
    factors: dict[str, dict[int, Factors]] = {}
    for name, matrix in matrices(config).items():
        rows, columns = matrix.shape
        for tensor, shape in zip(named[name], ((rank, columns), (rows, rank)), strict=True):
            if tensor in found and found[tensor].shape != shape:
                raise UsageError(f"{path}: expected {list(shape)} for {tensor}, got {list(found[tensor].shape)}")
        if named[name][0] in found:
            pair = Factors(*(found[tensor] for tensor in named[name]))
            factors.setdefault(matrix.path, {})[matrix.place] = pair
    return factors


def save(
    folder: Path,
    factors: Mapping[str, Factors],
    config: TransformerConfig,
    *,
    alpha: float,
    rslora: bool,
    base: str,
) -> None:
    """Writes an adapter as PEFT does; with several processes, all come here.

    Args:
        folder: exists; `files.new_folder` makes it, and gives it its name when it is complete.
        factors: of all layers, A [layers, r, in] and B [layers, out, r], by the names of `modules`; on any mesh.
        config: of the model.
        alpha: the numerator of the scale.
        rslora: its denominator is the root of r.
        base: the model that the adapter belongs to, for its configuration.
    """
    here = {module: Factors(*map(np.asarray, hosts.fetch(tuple(pair)))) for module, pair in factors.items()}
    if not hosts.is_first():
        return
    tensors = {
        PREFIX + name + suffix: np.ascontiguousarray(stack[matrix.layer], np.float32)
        for name, matrix in matrices(config).items()
        if matrix.layer is not None and name.rpartition(".")[2] in here
        for suffix, stack in zip(FACTORS, here[name.rpartition(".")[2]], strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rank = next(iter(here.values())).a.shape[1]
    fields = config_fields(config, list(here), rank=rank, alpha=alpha, rslora=rslora, base=base)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def config_fields(
    config: TransformerConfig, targets: Iterable[str], *, rank: int, alpha: float, rslora: bool, base: str
) -> dict[str, Any]:
    """The adapter_config.json of an adapter of all layers; see `save`."""
    targets = sorted(targets)
    names = matrices(config)
    wanted: str | list[str] = targets
    if any(name.rpartition(".")[2] in targets for name, matrix in names.items() if matrix.layer is None):
        # By its name alone PEFT would take LLaDA's head, ff_out, for one of them: an expression for whole names.
        prefix = next(name for name, matrix in names.items() if matrix.layer == 0).partition(".0.")[0]
        wanted = prefix.replace(".", r"\.") + rf"\.\d+\.(.*\.)?({'|'.join(targets)})"
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": wanted,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
