"""Every Orbax call of the project: trees of arrays to disk and back into their shardings."""

import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dllm_jax.checkpoints import files
from dllm_jax.errors import UsageError, naming
from dllm_jax.places import check_room

CHUNK_BYTES = 2**26  # small enough that a device reads little more than its own part
FILE_BYTES = 2**28  # small enough that the checksums of a model's files are computed on all processors


def save_params(path: Path, params: Mapping[str, jax.Array]) -> None:
    """Writes arrays by name; the folder appears when it is complete. Several processes all come here.

    Args:
        path: a folder that does not exist.
        params: arrays on any sharding, each in its own dtype.

    Raises:
        ValueError: the folder exists.
        OSError: naming it; the disk is full, or the like.
    """
    with _context(params.values()), _writing(path):
        ocp.save(path.absolute(), dict(params))


def save_by_groups(path: Path, groups: Iterable[Mapping[str, jax.Array]]) -> None:
    """Writes what `save_params` writes, of which no more than a group has to be in memory; for one process.

    Args:
        path: a folder that does not exist; until all is written there is a folder of another name beside it.
        groups: arrays by name.

    Raises:
        OSError: naming it; the disk is full, or the like.
    """
    with _writing(path):
        for group in groups:
            with _context(group.values()):
                ocp.partial.save(path.absolute(), dict(group))
            del group
            gc.collect()  # Orbax leaves cycles behind, with the arrays in them
        with ocp.Context():
            ocp.partial.finalize(path.absolute())


def stored_params(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `save_params` wrote.

    Raises:
        UsageError: it is not there or not complete.
    """
    try:
        stored = ocp.metadata(path.absolute()).metadata
    except (ocp.errors.InvalidLayoutError, OSError, ValueError) as error:
        raise UsageError(f"{path}: expected a complete Orbax checkpoint, got {_one_line(error)}") from error
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stored.items()}


def restore_params(
    path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], *, limit: int
) -> Iterator[tuple[str, jax.Array]]:
    """Reads arrays straight into the shardings and dtypes wanted, some at a time.

    Args:
        path: a folder that `save_params` or `save_by_groups` wrote.
        wanted: exactly the names and shapes stored there (see `stored_params`), each with a sharding.
        limit: bytes that are read at once, unless one array is larger.

    Yields:
        The name of an array, and the array, in the order of `wanted`.

    Raises:
        UsageError: the files are damaged so badly that they cannot be read.
    """
    for group in files.grouped({name: nbytes(array) for name, array in wanted.items()}, limit):
        with _context(wanted[name] for name in group):
            try:
                arrays = ocp.load(path.absolute(), {name: wanted[name] for name in group})
            except (ocp.errors.InvalidLayoutError, OSError, ValueError) as error:
                raise UsageError(f"{path}: expected a readable Orbax checkpoint, got {_one_line(error)}") from error
        yield from ((name, arrays.pop(name)) for name in group)


def nbytes(array: Any) -> int:
    """Bytes of an array, or of what has a shape and a dtype."""
    return math.prod(array.shape) * array.dtype.itemsize


class TrainingCheckpoints:
    """The numbered checkpoints of a training run, of which the newest is kept.

    Each holds a tree of arrays and a JSON object: the state of the iterator over the data. A checkpoint appears when it
    is complete; what an interrupted run left of another one is removed.

    Args:
        folder: where they are; made if it does not exist. Several processes must all see it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._pending: Any = None  # the write in the background
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(1),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, tree: Any, *, iterator: Mapping[str, Any]) -> None:
        """Begins to write the checkpoint of a step, in the background; one that is there already is left alone.

        The arrays may be donated as soon as this returns.

        Raises:
            OSError: naming the folder; this checkpoint or the one before could not be written.
        """
        self.wait()
        if self.latest() == step:
            return
        check_room(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        with _writing(self._folder):
            content = {"arrays": _by_name(tree), "iterator": dict(iterator)}
            self._pending = self._checkpointer.save_checkpointables_async(step, content)

    def wait(self) -> None:
        """Waits until the checkpoint that was begun last is complete.

        Raises:
            OSError: naming the folder; it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            with _writing(self._folder):
                pending.result()

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the newest checkpoint.

        Args:
            abstract: the tree that was saved, of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            UsageError: it cannot be read.
        """
        wanted = {"arrays": _by_name(abstract), "iterator": None}
        try:
            found = self._checkpointer.load_checkpointables(None, wanted)
        except (ocp.errors.InvalidLayoutError, OSError, ValueError) as error:
            raise UsageError(f"{self._folder}: expected a readable Orbax checkpoint, got {_one_line(error)}") from error
        leaves = [found["arrays"][name] for name in _by_name(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), found["iterator"]

    def close(self) -> None:
        """Waits for what is being written, and ends the threads of Orbax."""
        self.wait()
        self._checkpointer.close()


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their place in it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _context(arrays: Iterable[Any]) -> ocp.Context:
    """Options: no second copy of the weights in host memory, and no compression, which gains nothing on weights."""
    context = ocp.Context()
    limit = max(files.IN_FLIGHT_BYTES, *(2 * nbytes(array) for array in arrays))
    context.memory.write_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    context.memory.transfer_concurrent_bytes = limit
    context.pytree.loading.partial_load = True  # arrays are read some at a time
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tells a fault of the machine as one OSError, without the pages that Orbax logs about it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with naming(path):
            yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """The first line of an error, which in Orbax may be a page."""
    return str(error).partition("\n")[0][:200]
