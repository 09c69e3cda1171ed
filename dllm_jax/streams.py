"""Who speaks when several processes do one job: process 0, and no library in its name."""

import ctypes
import os
import signal
import sys
import threading

JAX_ENDS = "Polled an error from coordination service"  # in the first line of what JAX says before it aborts
FIRST_IS_LOST = "error: process 0 has ended: it was killed, or its host is gone"
FAULT = 1  # exit code
RELAY_SECONDS = 2.0  # in which what was written before an abort is read
_handler: object = None  # of SIGABRT; kept here, since C does not
_code: int | None = None  # the exit code, when it is known


def take_streams(*, speaks: bool) -> None:
    """Lets only process 0 speak; libraries only on the standard error (Gloo greets its peers on the output).

    Args:
        speaks: this is process 0.
    """
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(out if speaks else nowhere, "w", encoding=encoding, errors=errors)
    if not speaks:
        sys.stderr = sys.stdout
        _shorten_abort()


def expect_end(code: int) -> None:
    """Says that process 0 is about to end, which is no loss: this one ends with the same code."""
    global _code
    _code = code


def _shorten_abort() -> None:
    """Makes one line and an exit code of the page with which JAX aborts a process when process 0 is gone.

    What else comes to the standard error is passed on. `sys.__stderr__` stays the way to write there directly.
    """
    own = os.dup(2)
    sys.__stderr__ = os.fdopen(own, "w", encoding="utf-8", errors="backslashreplace")  # type: ignore[misc]
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    is_end = threading.Event()

    def relay() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if JAX_ENDS.encode() in line:
                    is_end.set()
                if not is_end.is_set():
                    os.write(own, line)

    def aborted(_: int) -> None:
        if is_end.wait(RELAY_SECONDS):  # else it aborts for another reason, after this returns
            if _code is None:
                os.write(own, f"{FIRST_IS_LOST}\n".encode())
            os._exit(FAULT if _code is None else _code)

    threading.Thread(target=relay, name="dllm_jax.streams", daemon=True).start()
    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)  # Python's own handlers would run too late
