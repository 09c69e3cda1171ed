"""Several processes, on one host or many, that do one job together (section `distributed` of the settings).

All of them run the same program on the same inputs, in the same order, on arrays that span the devices of all. Process
0 alone prints, shows progress, holds locks and writes files; what it finds there it tells the others (`from_first`).
All end with the same exit code: that of process 0, or of the first one that fails. Its mistake becomes one line of
process 0, wherever the others are by then (`dllm_jax/board.py`).

With one process, as most jobs are, all of this does nothing. JAX is imported only when it is needed.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dllm_jax.board import Board, Ended, Failure, Group
from dllm_jax.errors import UsageError
from dllm_jax.settings import DistributedSettings, check_fields
from dllm_jax.streams import take_streams

T = TypeVar("T")
_group: Group | None = None  # None: one process


def start(settings: DistributedSettings) -> None:
    """Joins the other processes, unless that is done or there is only this one; before JAX looks for devices.

    Raises:
        UsageError: the settings do not make sense, or the others did not come in time.
    """
    global _group
    check_fields("distributed", settings)
    settings.check("distributed", None)
    if _group or not (settings.auto or settings.num_processes > 1):
        return
    import jax
    from jax._src.distributed import global_state  # its store of keys and values has no public name

    where: dict[str, Any] = (
        {}
        if settings.auto
        else {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "cluster_detection_method": "deactivate",
        }
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=settings.start_seconds,
            heartbeat_timeout_seconds=10 * settings.lost_seconds,  # JAX's own end, with a page of text: later than ours
        )
    except (RuntimeError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise UsageError(
            f"distributed: expected {'processes that find each other' if settings.auto else settings.num_processes} "
            f"processes within {settings.start_seconds} s, got {told}"
        ) from None
    process, count = global_state.process_id, global_state.num_processes
    if count > 1:
        take_streams(speaks=process == 0)
        board = Board(global_state.client)
        _group = Group(board, process=process, count=count, lost_seconds=settings.lost_seconds)


def several() -> bool:
    """Whether there is more than this process."""
    return _group is not None


def is_first() -> bool:
    """Whether this process prints and writes files: process 0, or the only one."""
    return _group is None or _group.process == 0


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, for all processes: only there `make` is called, with all files it may write.

    A mistake that it raises ends all processes. All must come here, in the same order.
    """
    return make() if _group is None else _group.from_first(make)


def meet() -> None:
    """Waits until all processes have come here, so that what is wrong in one ends the job before the next step."""
    if _group:
        _group.meet()


def agreed(name: str, value: T) -> T:
    """The value of process 0 under a name, the first it had: for what the processes may see differently."""
    return value if _group is None else _group.agreed(name, value)


def wished(what: str, mine: bool) -> bool:
    """Whether any process wishes something, now or before, as far as process 0 knows; all must come here.

    Args:
        what: a name.
        mine: this process does.
    """
    return mine if _group is None else _group.wished(what, mine)


def same(what: str, mine: Mapping[str, Any], *, difference: Callable[[Any, Any], str]) -> None:
    """Makes sure that all processes have the same.

    Args:
        what: they have, for the error.
        mine: of this process.
        difference: says in words how the second differs from the first, "" if it does not.

    Raises:
        UsageError: this process has something else than process 0.
    """
    if _group is None:
        return
    if got := difference(_group.from_first(lambda: mine), mine):
        raise UsageError(f"distributed: expected the {what} of process 0 in all processes, got {got}")
    _group.meet()


def fetch(tree: T) -> T:
    """The arrays of a tree with all their parts here, in every process; with one process the tree as it is."""
    if _group is None:
        return tree
    import jax
    import numpy as np

    leaves, structure = jax.tree.flatten(tree)
    far = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if far:
        whole = _gather(leaves[far[0]].sharding.mesh)([leaves[i] for i in far])
        for i, array in zip(far, whole, strict=True):
            leaves[i] = np.asarray(array)
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _gather(mesh: Any) -> Callable[[Any], Any]:
    """What copies arrays to every device of a mesh."""
    import jax

    return jax.jit(lambda arrays: arrays, out_shardings=jax.NamedSharding(mesh, jax.P()))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays of the host, the same in all processes, on the devices of all: `jax.device_put` without comparing them.

    Args:
        tree: of arrays.
        shardings: of each, in the same tree.
    """
    import jax
    import numpy as np

    if _group is None:
        return jax.device_put(tree, shardings)

    def parts(x: Any, sharding: Any) -> Any:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(parts, tree, shardings)


def everywhere(tree: T) -> T:
    """Arrays of the host, the same in all processes, on every device of all; with one process the tree as it is."""
    if _group is None:
        return tree
    import jax

    sharding = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("devices",)), jax.P())
    return place(tree, jax.tree.map(lambda _: sharding, tree))


def blames_others(error: Exception) -> bool:
    """Whether an error of this process is the fault of another one, which has failed or is lost; this takes a while."""
    if _group is None or isinstance(error, Ended):
        return _group is not None
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and _group.failed()


def conclude(code: int, line: str) -> int:
    """Ends the job in all processes and tells why it failed: one line on the standard error of process 0.

    Args:
        code: the exit code of this process.
        line: what went wrong here; "" for nothing.

    Returns:
        The exit code of all.
    """
    if _group:
        return _group.conclude(Failure(code, line))
    if line:
        print(line, file=sys.stderr, flush=True)
    return code


def stop() -> None:
    """Parts from the other processes, before this one ends as it should."""
    global _group
    if _group:
        _group.stop()
        _group = None
