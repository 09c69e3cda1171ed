"""What several processes agree on, with a board in this process instead of JAX's; settings; the order of a mesh."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dllm_jax import board, hosts, mesh
from dllm_jax.board import Board, Ended, Failure, Group
from dllm_jax.errors import UsageError
from dllm_jax.settings import DistributedSettings


class Client:
    """The store of JAX's distributed runtime, for the processes of a test."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    key_value_set_bytes = key_value_set

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in dict(self.values).items() if key.startswith(prefix)]

    def blocking_key_value_get_bytes(self, key: str, milliseconds: int) -> bytes:
        for _ in range(milliseconds):
            if key in self.values:
                return self.values[key]
            time.sleep(0.001)
        raise RuntimeError("DEADLINE_EXCEEDED: too late")


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of processes that were ended by their watching threads."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit  # of the thread

    monkeypatch.setattr(os, "_exit", leave)
    return codes


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, exits: list[int]) -> Iterator[Callable[[int], list[Group]]]:
    """Call it with a number of processes."""
    monkeypatch.setattr(board, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(board, "WAIT_SECONDS", 0.05)
    made: list[Group] = []

    def make(count: int) -> list[Group]:
        shared = Board(Client())
        made.extend(Group(shared, process=process, count=count, lost_seconds=1.0) for process in range(count))
        return made

    yield make
    for group in made:
        group.stop()


def together(groups: list[Group], act: Callable[[Group], Any]) -> list[Any]:
    """What `act` returns in every process, or the exception that it raises there."""
    results: list[Any] = [None] * len(groups)

    def work(group: Group) -> None:
        try:
            results[group.process] = act(group)
        except Exception as error:
            results[group.process] = error

    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_all_get_what_the_first_makes(groups: Callable[[int], list[Group]]) -> None:
    calls = []

    def act(group: Group) -> list[Any]:
        def make() -> dict[str, int]:
            calls.append(group.process)
            return {"rows": 3}

        return [group.from_first(make), group.from_first(lambda: None), group.agreed("memory", group.process)]

    assert together(groups(3), act) == [[{"rows": 3}, None, 0]] * 3
    assert calls == [0]


def test_all_end_with_the_code_of_the_first(groups: Callable[[int], list[Group]]) -> None:
    both = groups(2)
    for code in (0, 1, 0):  # jobs of one command
        assert (
            together(both, lambda group, code=code: group.conclude(Failure(code if group.process == 0 else 0, "")))
            == [code] * 2
        )


def test_a_mistake_of_another_process_ends_those_who_wait(
    groups: Callable[[int], list[Group]], capsys: pytest.CaptureFixture[str], exits: list[int]
) -> None:
    def act(group: Group) -> int:
        try:
            if group.process == 2:
                raise UsageError("input.path: expected a file, got none")
            group.meet()
        except UsageError as error:
            return group.conclude(Failure(2, f"error: {error}"))
        except Ended:
            return group.conclude(Failure(0, ""))
        raise AssertionError("met a process that has failed")

    assert together(groups(3), act) == [2, 2, 2]
    assert capsys.readouterr().err == "error: process 2: input.path: expected a file, got none\n"
    assert not exits


def test_its_own_mistake_is_what_the_first_tells(
    groups: Callable[[int], list[Group]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert together(groups(2), lambda group: group.conclude(Failure(2, "error: mesh: too large"))) == [2, 2]
    assert capsys.readouterr().err == "error: mesh: too large\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_computes_on_is_ended(
    groups: Callable[[int], list[Group]],
    capsys: pytest.CaptureFixture[str],
    exits: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(board, "GRACE_SECONDS", 0.1)
    first, second = groups(2)  # the first does not come to an end
    assert second.conclude(Failure(2, "error: mesh: too large")) == 2
    first._thread.join(10)
    assert exits == [2]
    assert capsys.readouterr().err == "error: process 1: mesh: too large\n"


def test_a_lost_process_ends_the_others(
    groups: Callable[[int], list[Group]], capsys: pytest.CaptureFixture[str], exits: list[int]
) -> None:
    first, second, third = groups(3)
    third.stop()  # no signs of life any more

    def act(group: Group) -> int:
        return group.conclude(Failure(0, "")) if group.failed() else -1

    assert together([first, second], act) == [1, 1]
    assert capsys.readouterr().err == (
        "error: process 2 has given no sign of life for 1 s: it was killed, or its host is gone\n"
    )
    assert not exits


def test_other_settings_are_named(groups: Callable[[int], list[Group]], monkeypatch: pytest.MonkeyPatch) -> None:
    def difference(theirs: dict[str, int], mine: dict[str, int]) -> str:
        return "" if theirs == mine else f"seed {mine['seed']}"

    first, second = groups(2)
    monkeypatch.setattr(hosts, "_group", second)
    first.board.tell("value/0", b"\x80\x04}\x94\x8c\x04seed\x94K\x01s.")  # {"seed": 1}
    with pytest.raises(UsageError, match=r"distributed: expected the settings of process 0 in all .*, got seed 2"):
        hosts.same("settings", {"seed": 2}, difference=difference)


def test_with_one_process_nothing_happens() -> None:
    tree = {"a": jax.numpy.arange(3)}
    hosts.start(DistributedSettings())
    assert not hosts.several()
    assert hosts.is_first()
    assert hosts.from_first(lambda: tree) is tree
    assert hosts.fetch(tree) is tree
    assert hosts.everywhere(tree) is tree
    assert hosts.agreed("memory", 5) == 5
    assert hosts.conclude(3, "") == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_processes": 2}, "distributed.coordinator: expected HOST:PORT for 2 processes, got none"),
        ({"coordinator": "localhost"}, "distributed.coordinator: expected HOST:PORT, got 'localhost'"),
        ({"coordinator": "localhost:99999"}, "distributed.coordinator: expected HOST:PORT"),
        ({"num_processes": 0}, "distributed.num_processes: expected at least 1, got 0"),
        ({"process_id": 1}, "distributed.process_id: expected 0 to 0, got 1"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "distributed.process_id: expected 0 to 1"),
        ({"auto": True, "num_processes": 2}, "distributed.auto: expected no coordinator"),
        ({"lost_seconds": 0}, "distributed.lost_seconds: expected at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=f"^{told}"):
        hosts.start(dataclasses.replace(DistributedSettings(), **changes))


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def test_the_last_axes_of_a_mesh_stay_in_a_process() -> None:
    devices: Any = [Device(i, process) for i, process in enumerate((1, 0, 1, 0, 0, 1, 1, 0))]  # as JAX may list them
    chosen: Any = np.array(mesh.even_share(devices, 8)).reshape(2, 2, 2)
    for row in chosen.reshape(4, 2):
        assert row[0].process_index == row[1].process_index
    for data, part in enumerate(chosen):
        assert {device.process_index for device in part.flat} == {data}


def test_a_small_mesh_has_devices_of_every_process() -> None:
    devices: Any = [Device(i, i // 4) for i in range(8)]
    assert [device.id for device in mesh.even_share(devices, 4)] == [0, 1, 4, 5]
    for needed in (1, 3):
        with pytest.raises(UsageError, match="mesh: expected devices of all 2 processes in equal numbers, at most 4"):
            mesh.even_share(devices, needed)
