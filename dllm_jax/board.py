"""How the processes of a job know of each other: values of process 0, mistakes, signs of life, the exit code."""

import contextlib
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dllm_jax.streams import FAULT, expect_end

T = TypeVar("T")
GRACE_SECONDS = 10.0  # for a program to end by itself when the job has failed
PERIOD_SECONDS = 0.5  # between two looks at the board, and two signs of life
POLL_SECONDS = 0.05  # between two looks of a process that has nothing else to do
WAIT_SECONDS = 1.0  # after which a process that waits for a value looks whether the job goes on


class Ended(Exception):  # noqa: N818 - an end, not a mistake of this process
    """The job has ended elsewhere; there is nothing to say here."""


class Failure(NamedTuple):
    """Why a job ends."""

    code: int
    line: str  # for people; "" if another process tells it


class Board:
    """Texts that can be replaced, and bytes that cannot, by key: the store of JAX's distributed runtime.

    Args:
        client: of that runtime.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, key: str, value: str) -> None:
        """Writes a text, over the one that is there."""
        self._client.key_value_set(f"dllm_jax/{key}", value, allow_overwrite=True)

    def find(self, folder: str) -> dict[str, str]:
        """The texts whose keys begin with FOLDER/, by the rest of their keys."""
        prefix = f"dllm_jax/{folder}/"
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}

    def tell(self, key: str, value: bytes) -> None:
        """Writes bytes of any length."""
        self._client.key_value_set_bytes(f"dllm_jax.told/{key}", value)

    def hear(self, key: str) -> bytes | None:
        """Waits a little for the bytes that `tell` writes; None if they did not come."""
        try:
            return self._client.blocking_key_value_get_bytes(f"dllm_jax.told/{key}", int(1000 * WAIT_SECONDS))
        except RuntimeError as error:  # JAX's, with the status in its text
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None


class Group:
    """The processes of a job, seen from one of them. A thread gives signs of life and looks for those of others.

    Args:
        board: where they meet.
        process: index of this one.
        count: of all.
        lost_seconds: without a sign of life for so long a process is given up.
    """

    def __init__(self, board: Board, *, process: int, count: int, lost_seconds: float) -> None:
        self.board, self.process, self.count, self.lost_seconds = board, process, count, lost_seconds
        self._found: tuple[int, Failure | None] = (0, None)  # why which round failed elsewhere
        self._round = self._values = self._beats = 0  # conclusions, values of process 0, signs of life so far
        self._agreed: dict[str, Any] = {}
        self._concluding = threading.Lock()
        self._signs = _Signs(range(1, count) if process == 0 else [0], lost_seconds=lost_seconds)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dllm_jax.board", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Failure | None:
        """What has ended the job elsewhere."""
        round_, failure = self._found
        return failure if round_ == self._round else None

    def from_first(self, make: Callable[[], T]) -> T:
        """What process 0 makes, for all; the others wait for it as long as the job goes on.

        Raises:
            Ended: the job does not go on.
        """
        if self.failure:
            raise Ended
        key, self._values = f"value/{self._values}", self._values + 1
        if self.process:
            return pickle.loads(self._hear(key))
        value = make()
        self.board.tell(key, pickle.dumps(value))
        return value

    def meet(self) -> None:
        """Waits until all processes have come here.

        Raises:
            Ended: one will not.
        """
        folder = f"here/{self._values}"
        if self.process:
            self.board.put(f"{folder}/{self.process}", "")

        def gather() -> None:
            while len(self.board.find(folder)) < self.count - 1:
                if self.failure:
                    raise Ended
                time.sleep(POLL_SECONDS)

        self.from_first(gather)

    def wished(self, what: str, mine: bool) -> bool:
        """Whether any process wishes something, now or before, as far as process 0 knows.

        Raises:
            Ended: the job does not go on.
        """
        if mine:
            self.board.put(f"wishes/{what}/{self.process}", "")
        return self.from_first(lambda: bool(self.board.find(f"wishes/{what}")))

    def agreed(self, name: str, value: T) -> T:
        """The value that process 0 had when it was asked first for this name."""
        if name not in self._agreed:
            if self.process == 0:
                self.board.tell(f"agreed/{name}", pickle.dumps(value))
            self._agreed[name] = pickle.loads(self._hear(f"agreed/{name}"))
        return self._agreed[name]

    def _hear(self, key: str) -> bytes:
        while (found := self.board.hear(key)) is None:
            if self.failure:
                raise Ended
        return found

    def failed(self) -> bool:
        """Waits until it is clear whether another process is the reason for an error of this one."""
        latest = time.monotonic() + self.lost_seconds + GRACE_SECONDS + 4 * PERIOD_SECONDS
        while not self.failure and time.monotonic() < latest:
            time.sleep(POLL_SECONDS)
        return self.failure is not None

    def conclude(self, mine: Failure) -> int:
        """Ends the job, or one of several that a command does, in all processes.

        Args:
            mine: what this process has to say; code 0 if nothing went wrong here.

        Returns:
            The exit code of all. Why the job failed is printed, by process 0 if it lives.
        """
        with self._concluding:
            code = self._follow(mine) if self.process else self._lead(mine)
            self._round += 1
        return code

    def _lead(self, mine: Failure) -> int:
        """In process 0, whose own line counts first: tells the code, and waits until all that live know it."""
        code, line = mine if mine.line else self.failure or mine
        if line:
            print(line, file=sys.stderr, flush=True)
        self.board.put(f"ended/{self._round}/code", str(code))
        latest = time.monotonic() + GRACE_SECONDS + self.lost_seconds
        while len(self._signs.lost | self.board.find(f"left/{self._round}").keys()) < self.count - 1:
            if time.monotonic() > latest:
                break
            time.sleep(POLL_SECONDS)
            self._live()
        return code

    def _follow(self, mine: Failure) -> int:
        """In the others: tells process 0 of a mistake, and waits for the code."""
        with contextlib.suppress(RuntimeError):
            if mine.code:
                self.board.put(f"mistakes/{self._round}/{self.process}", json.dumps(mine))
        while not ((failure := self.failure) and failure.line):
            with contextlib.suppress(RuntimeError):  # the store is lost with process 0
                if ended := self.board.find(f"ended/{self._round}"):
                    if code := int(ended["code"]):
                        expect_end(code)
                    self.board.put(f"left/{self._round}/{self.process}", "")
                    return code
            time.sleep(POLL_SECONDS)
        print(failure.line, file=sys.__stderr__, flush=True)
        return failure.code

    def stop(self) -> None:
        """Ends the watching thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        """Gives signs of life, looks for the end, and brings it about where the program does not conclude in time."""
        round_, latest = -1, 0.0
        while not self._stopped.wait(PERIOD_SECONDS):
            if self._round != round_:
                round_, latest = self._round, time.monotonic() + GRACE_SECONDS
            found = None
            with contextlib.suppress(RuntimeError):  # the store is lost with process 0
                self._live()
                found = self._ended(round_) if self.process else self._mistake(round_)
            self._found = round_, found or self._signs.failure()
            if not self.failure:
                latest = time.monotonic() + GRACE_SECONDS
            elif time.monotonic() > latest:
                self._end(round_)

    def _live(self) -> None:
        """Gives a sign of life and looks for those of others."""
        self._beats += 1
        self.board.put(f"lives/{self.process}/beat", str(self._beats))
        self._signs.see(self.board.find("lives/0" if self.process else "lives"))

    def _mistake(self, round_: int) -> Failure | None:
        """What another process has found wrong."""
        mistakes = self.board.find(f"mistakes/{round_}")
        if not mistakes:
            return None
        process = min(mistakes, key=int)
        code, line = json.loads(mistakes[process])
        return Failure(code, line.replace("error: ", f"error: process {process}: ", 1))

    def _ended(self, round_: int) -> Failure | None:
        """Whether process 0 has ended the job."""
        code = int(self.board.find(f"ended/{round_}").get("code", 0))
        return Failure(code, "") if code else None

    def _end(self, round_: int) -> None:
        """Ends the process, unless its program concludes just now."""
        with self._concluding:
            if self._round == round_:
                code = self._follow(Failure(0, "")) if self.process else self._lead(Failure(0, ""))
                os._exit(code)


class _Signs:
    """The last signs of life of processes.

    Args:
        processes: to look at.
        lost_seconds: without a new one for so long a process is lost.
    """

    def __init__(self, processes: Any, *, lost_seconds: float) -> None:
        self._lost_seconds = lost_seconds
        self._last = {str(process): ("", time.monotonic()) for process in processes}

    def see(self, signs: Mapping[str, str]) -> None:
        """Notes what is new among signs, by PROCESS/beat, or by beat if only one process is looked at."""
        for process, (sign, _) in self._last.items():
            new = signs.get(f"{process}/beat") or signs.get("beat", sign)
            if new != sign:
                self._last[process] = (new, time.monotonic())

    @property
    def lost(self) -> set[str]:
        """The processes that are lost."""
        now = time.monotonic()
        return {process for process, (_, since) in self._last.items() if now - since > self._lost_seconds}

    def failure(self) -> Failure | None:
        """That of a lost process."""
        if not self.lost:
            return None
        process = min(self.lost, key=int)
        told = f"no sign of life for {self._lost_seconds:g} s: it was killed, or its host is gone"
        return Failure(FAULT, f"error: process {process} has given {told}")
