"""Reads and writes Hugging Face folders (config.json + safetensors) without torch.

Headers are read first, so mistakes in a checkpoint are reported before its gigabytes are touched. Then the parts of the
parameters that the devices of this process hold are assembled from memory-mapped tensors, by several threads, and sent
to their devices one parameter after the other.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dllm_jax import hosts
from dllm_jax.checkpoints import files, foreign, layout
from dllm_jax.errors import UsageError
from dllm_jax.models import registry
from dllm_jax.models.model import Model, abstract_model
from dllm_jax.models.transformer import TransformerConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what Hugging Face tools write
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8  # bytes
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # saved by some, needed by none
COMPARED_ROWS = 4096  # of head and embedding at once
READERS = 8  # threads that read and assemble; each maps the rows of one job (`layout.JOB_ELEMENTS`)

Track = Callable[[Iterable[Any]], Iterable[Any]]  # wraps an iterable, to show progress
_Bounds = tuple[tuple[int, int], ...]  # of a part of an array: start and stop on every axis


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file, not read yet; indexing reads."""

    file: Path
    offset: int
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)

    def __getitem__(self, box: layout.Index) -> np.ndarray:
        """A part, memory-mapped alone, so that what was read leaves memory with it: rows, then all or some columns."""
        (start, stop, _), row = box[0].indices(self.shape[0]), self.shape[1:]
        offset = self.offset + start * math.prod(row) * np.dtype(DTYPES[self.dtype]).itemsize
        rows = dataclasses.replace(self, offset=offset, shape=(stop - start, *row))
        return rows.map()[:, *box[1:]]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        UsageError: the file is absent, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks header, offsets and the length of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: expected a complete safetensors file, got {error}") from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, 8 + length + fields["data_offsets"][0], fields["dtype"], tuple(fields["shape"]))
        for name, fields in header.items()
    }


def read_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, in one file or in several with an index.

    Raises:
        UsageError: no weights, a missing or broken file, or an index that disagrees with its files.
    """
    index = folder / INDEX
    if (folder / SINGLE).exists() and index.exists():
        raise UsageError(f"{folder}: expected {SINGLE} or {INDEX}, got both: remove the one that is not this model's")
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not index.exists():
        raise foreign.absent(folder, SINGLE, INDEX)
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UsageError(f"{index}: expected a weight_map from tensors to files, got {type(weight_map).__name__}")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    if absent:
        raise UsageError(f"{index}: expected all its files in the folder, got none for {files.abbreviate(absent)}")
    headers = {shard: read_header(folder / shard) for shard in shards}
    astray = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in headers[shard]]
    if astray:
        raise UsageError(f"{index}: expected every tensor in its file, got none for {files.abbreviate(astray)}")
    unlisted = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return unlisted | {name: headers[shard][name] for name, shard in weight_map.items()}


def read_tensors(folder: Path, config: TransformerConfig) -> tuple[TransformerConfig, dict[str, list[Tensor]]]:
    """Matches the headers of a folder with its config.json; no weights are read, no model is built.

    Args:
        folder: with safetensors.
        config: what its config.json says.

    Returns:
        The configuration, in which it is now settled whether the head is the embedding, and our parameter path -> its
        tensors, all present and of the right shape. A tied model may store its head too: it is in "head".

    Raises:
        UsageError: the folder does not hold exactly the tensors its config.json describes, or in dtypes we do not know.
    """
    found = {name: tensor for name, tensor in read_headers(folder).items() if not name.endswith(BUFFERS)}
    foreign.refuse_tensors(folder, {name: tensor.dtype for name, tensor in found.items()}, known=DTYPES)
    embedding, head = registry.embedding_and_head(config)
    config = layout.settled(
        config,
        {
            path: np.dtype(DTYPES[found[names[0]].dtype])
            for path, names in (registry.tensor_names(config) | {"head": (head,)}).items()
            if names[0] in found
        },
    )
    if config.tied_embeddings and embedding not in found and head in found:
        found[embedding] = found.pop(head)  # one matrix: some tools keep the name that comes first
    layers = registry.count_layers(config, found)
    if layers != config.num_layers:
        told = f"those of {layers}" if layers else f"{files.abbreviate(list(found)) or 'none'}"
        raise UsageError(f"{folder}: expected the tensors of {config.num_layers} layers (config.json), got {told}")
    expected = expected_tensors(config)
    shapes = {name: shape for tensors in expected.values() for name, shape in tensors.items()}
    if config.tied_embeddings and head in found:
        expected["head"] = {head: shapes[embedding]}
        shapes |= expected["head"]
    layout.check_shapes(folder, shapes, {name: tensor.shape for name, tensor in found.items()})
    whole = {path: [found[name] for name in tensors] for path, tensors in expected.items()}
    pieces = dict(zip(registry.tensor_names(config), _part_shapes(config), strict=True))
    return config, {path: _pieces(some, pieces[path]) if path in pieces else some for path, some in whole.items()}


def expected_tensors(config: TransformerConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameter path, as stored -> the names and shapes of its tensors."""
    return {
        path: layout.whole_shapes(path, names, shapes)
        for (path, names), shapes in zip(registry.tensor_names(config).items(), _part_shapes(config), strict=True)
    }


def _part_shapes(config: TransformerConfig) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tensors of every parameter, those that are in one tensor each on its own."""
    # Layers are alike, but for those with an MLP where others have experts: the first of each stands for all.
    dense = [config.is_dense(layer) for layer in range(config.num_layers)]
    alike = [dense.index(each) for each in dense]
    some = dataclasses.replace(config, num_layers=max(alike) + 1, kv_copies=1, stacked=False, quantize="")
    params = layout.flatten(abstract_model(some, dtype=np.dtype(np.float32))[1])
    shapes = {path: layout.tensor_shapes(path, param.shape) for path, param in params.items()}
    for path in registry.tensor_names(config):
        yield shapes[re.sub(r"^layers\.(\d+)", lambda found: f"layers.{alike[int(found[1])]}", path)]


def _pieces(tensors: Iterable[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors taken apart into pieces of the shapes given, which lie behind each other in them."""
    pieces, coming = [], iter(shapes)
    for tensor in tensors:
        offset, end = tensor.offset, tensor.offset + tensor.nbytes
        while offset < end:
            piece = dataclasses.replace(tensor, offset=offset, shape=next(coming))
            pieces.append(piece)
            offset += piece.nbytes
    return pieces


def stored_dtype(tensors: Mapping[str, list[Tensor]]) -> np.dtype:
    """The dtype that holds every tensor exactly: theirs, unless they differ; biases of routers keep their own."""
    plain = [group for path, group in tensors.items() if not path.endswith(layout.BIAS)]
    return jnp.result_type(*{DTYPES[tensor.dtype] for group in plain for tensor in group})


class _Begun(NamedTuple):
    """A parameter of which the parts are being read."""

    wanted: jax.ShapeDtypeStruct
    parts: dict[_Bounds, np.ndarray]  # what the devices of this process hold, each part once
    jobs: list[Future[None]]

    def placed(self) -> jax.Array:
        """The parameter on its devices, after all of it was read."""
        for job in self.jobs:
            job.result()
        shape, sharding = self.wanted.shape, self.wanted.sharding
        array = jax.make_array_from_callback(shape, sharding, lambda index: self.parts[_bounds(index, shape)])
        return array.block_until_ready()  # or slow transfers would pile up in host memory


def read_params(
    tensors: Mapping[str, list[Tensor]],
    *,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    limit: int,
    track: Track = iter,
) -> Iterator[tuple[str, jax.Array]]:
    """Reads a model's parameters, in order, into the shapes, dtypes and shardings wanted.

    Of every tensor a process reads what its devices hold, once. While a parameter goes to its devices the next ones are
    read, as many as `limit` bytes of host memory take (one that is larger is read alone).

    Args:
        tensors: from `read_tensors`.
        wanted: by parameter path; every value has a sharding.
        limit: bytes of the parameters that are being read.
        track: wraps the paths that are looped over, to show progress.

    Yields:
        The path of a parameter, and the parameter.

    Raises:
        UsageError: the head that a tied model stores is not its embedding.
    """
    if "head" in tensors and "head" not in wanted:
        _check_tied(head=tensors["head"][0], embedding=tensors["embedding"][0])
    coming = collections.deque(wanted)
    begun: collections.deque[_Begun] = collections.deque()
    room = limit
    pool = ThreadPoolExecutor(READERS)
    try:
        for path in track(list(wanted)):
            while coming and (not begun or _part_bytes(wanted[coming[0]]) <= room):
                following = coming.popleft()
                begun.append(_begin(following, tensors[following], wanted[following], pool))
                room -= _part_bytes(wanted[following])
            room += _part_bytes(wanted[path])
            yield path, begun.popleft().placed()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(path: str, tensors: list[Tensor], wanted: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor) -> _Begun:
    """Has the parts of a parameter read by the pool."""
    jobs: list[Future[None]] = []
    parts = {
        bounds: layout.fuse(
            path,
            tensors,
            shape=wanted.shape,
            dtype=wanted.dtype,
            index=tuple(slice(*pair) for pair in bounds),
            run=lambda job: jobs.append(pool.submit(job)),
        )
        for bounds in _held(wanted)
    }
    return _Begun(wanted, parts, jobs)


def _held(wanted: jax.ShapeDtypeStruct) -> set[_Bounds]:
    """The parts of an array that the devices of this process hold."""
    indices = wanted.sharding.addressable_devices_indices_map(wanted.shape).values()
    return {_bounds(index, wanted.shape) for index in indices}


def _bounds(index: layout.Index | None, shape: tuple[int, ...]) -> _Bounds:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True))


def _part_bytes(wanted: jax.ShapeDtypeStruct) -> int:
    """Host memory of the parts of an array."""
    return len(_held(wanted)) * math.prod(wanted.sharding.shard_shape(wanted.shape)) * wanted.dtype.itemsize


def _check_tied(*, head: Tensor, embedding: Tensor) -> None:
    """Refuses a head that is not the embedding to which config.json ties it."""
    for start in range(0, head.shape[0], COMPARED_ROWS):
        rows = (slice(start, start + COMPARED_ROWS), slice(None))
        if not np.array_equal(head[rows].astype(np.float64), embedding[rows].astype(np.float64), equal_nan=True):
            raise UsageError(
                f"{head.file}: expected a head equal to the embedding, since config.json ties them, got another one "
                "(if it is right, set weight_tying, in Qwen tie_word_embeddings, to false)"
            )


def export_hf(model: Model, target: Path, *, shard_bytes: int = SHARD_BYTES, track: Track = iter) -> None:
    """Writes a model as a Hugging Face folder: safetensors, config.json and the tokenizer of the folder it came from.

    Args:
        model: from `load_model`; its weights are written in their dtype, one parameter after the other.
        target: a folder that is empty or does not exist.
        shard_bytes: a file holds no more than this, unless one parameter alone is larger.
        track: wraps the parameters that are looped over, to show progress.

    Raises:
        UsageError: the model has random weights, hence no config.json to copy, or weights in 8 bits; or the target
            holds something.
    """
    refuse_quantized(model.config)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise UsageError(f"{target}: expected an empty folder to export to, got one with files")
    if not model.path:
        raise UsageError("model: expected one that was loaded from a folder, got random weights without a config.json")
    write_tensors(model, target, shard_bytes=shard_bytes, track=track)
    files.write_config(Path(model.path), target, dtype=model.dtype.name)
    files.copy_companions(Path(model.path), target)


def refuse_quantized(config: TransformerConfig) -> None:
    """Refuses to export weights in 8 bits.

    Raises:
        UsageError: they are.
    """
    if config.quantize:
        raise UsageError(f"model: expected weights that are not quantized, got {config.quantize}")


def write_tensors(model: Model, target: Path, *, shard_bytes: int = SHARD_BYTES, track: Track = iter) -> None:
    """Writes the weights of a model, the first part of `export_hf`; with several processes, all come here."""
    params, apart = layout.flatten(model.params), model.config.apart
    _, abstract = abstract_model(dataclasses.replace(model.config, stacked=False), dtype=model.dtype)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in layout.flatten(abstract).items()}
    tracked = ((path, _of_list(params, path, apart=apart)) for path in track(list(shapes)))
    write_params(tracked, target, config=model.config, shapes=shapes, shard_bytes=shard_bytes)


def _of_list(params: Mapping[str, jax.Array], path: str, *, apart: int) -> jax.Array:
    """A parameter as a list of layers has it, from such parameters or from stacked ones behind `apart` others."""
    if path in params:
        return params[path]
    name, layer = layout.stack_place(path, apart=apart)
    return params[name] if layer is None else layout.unstacked(path.rpartition(".")[2], params[name][layer])


def write_params(
    params: Iterable[tuple[str, jax.Array]],
    target: Path,
    *,
    config: TransformerConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights of a model, of which no more than one parameter and its tensors have to be in memory.

    Args:
        params: by path, in the order of `shapes`.
        target: a folder.
        config: of the model.
        shapes: and dtypes of the parameters.
        shard_bytes: a file holds no more than this, unless one parameter alone is larger.
    """
    names = registry.tensor_names(config)
    sizes = {path: shape.size * shape.dtype.itemsize for path, shape in shapes.items()}
    shards = files.grouped(sizes, shard_bytes)
    if not hosts.is_first():
        for _, param in params:
            hosts.fetch(param)  # process 0 needs the parts that are here
        return
    coming = iter(params)
    weight_map: dict[str, str] = {}
    for number, paths in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: jax.ShapeDtypeStruct(shape, shapes[path].dtype)
            for path in paths
            for name, shape in layout.whole_shapes(
                path, names[path], layout.tensor_shapes(path, shapes[path].shape)
            ).items()
        }
        some = itertools.islice(coming, len(paths))
        split = (layout.split(path, np.asarray(hosts.fetch(param))) for path, param in some)
        _write_file(target / file, tensors, itertools.chain.from_iterable(split))
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file: the length of its header in 8 bytes, the header, and one array after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.size * shape.dtype.itemsize
        header[name] = {"dtype": NAMES[shape.dtype], "shape": shape.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
