"""A job that is asked to end early: SIGTERM, which comes before a machine is taken away."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dllm_jax import hosts


class Stop:
    """Whether this process or another one was asked to end; to be asked where all processes come by.

    Attributes:
        heeded: it was so when this was called last.
    """

    def __init__(self) -> None:
        self.heeded = False
        self._asked = False

    def __call__(self) -> bool:
        """Whether some process was."""
        self.heeded = self.heeded or hosts.wished("stop", self._asked)
        return self.heeded

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal; the second time, too."""
        self._asked = True


@contextlib.contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Lets SIGTERM only ask while the block runs, and to the end of the process once that was heeded."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        if not stop.heeded:
            signal.signal(signal.SIGTERM, before)
