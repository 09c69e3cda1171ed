"""Whether an answer to a problem of MATH says the same as the reference: math-verify, in a process of its own.

What a model writes may be a number that no computer can write down, so time and memory of the comparison are limited
from outside.
"""

import functools
import json
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

from dllm_jax.evals.numbers import MINUS, boxed

WORKER = Path(__file__).with_name("math_worker.py")
SECONDS = 10.0  # for one comparison
STARTING = 60.0  # for the first one of a process, which imports sympy
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|\s+|~")
_DRESS = (
    (re.compile(r"\\(?:left|right|displaystyle)\b"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[$%]|\$"), ""),
)


class Worker:
    """The process that compares; started when it is needed, and anew after it took too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def same(self, text: str, answer: str) -> bool:
        """Whether a text comes to the answer; False if that cannot be told in time."""
        with self._lock:
            seconds = SECONDS
            if self._process is None or self._process.poll() is not None:
                self._process, seconds = self._start(), STARTING
            asked, told = self._process.stdin, self._process.stdout
            assert asked is not None
            assert told is not None
            try:
                print(json.dumps([answer, text]), file=asked, flush=True)
                line = told.readline() if select.select([told], [], [], seconds)[0] else ""
            except OSError:  # it has ended
                line = ""
            if not line:
                self._process.kill()
                self._process.communicate()
                self._process = None
            return line.strip() == "true"

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )


@functools.cache
def worker() -> Worker:
    """The one of this process; it ends when its stdin does."""
    return Worker()


def same_value(text: str, answer: str) -> bool:
    r"""The last \boxed{} of a text, else what it states in the end, equals the reference as mathematics.

    What is spelled as the reference is right without any mathematics: words, choices, several answers in order.
    """
    content = boxed(text)
    if content and _plain(content) == _plain(answer):
        return True
    return worker().same(text.translate(MINUS), answer.translate(MINUS))


def _plain(latex: str) -> str:
    """LaTeX without what only concerns its looks."""
    latex = latex.translate(MINUS)
    for pattern, instead in _DRESS:
        latex = pattern.sub(instead, latex)
    return _SPACES.sub("", latex).rstrip(".")
