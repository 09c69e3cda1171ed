"""What a program of a model may not do, and what it may."""

import os
import signal
import sys
import time

import pytest

from dllm_jax.evals.sandbox import PASSED, CodeLimits, outcome

LIMITS = CodeLimits(seconds=20.0, memory_mb=512)  # a busy machine takes a second for what is soon refused
kernel = pytest.mark.skipif(sys.platform != "linux", reason="system calls are filtered on Linux")


def libc(call):
    """A program that makes a C call past Python's own events and tells how it went."""
    return f"import ctypes\nlib = ctypes.CDLL(None, use_errno=True)\nassert lib.{call} >= 0, ctypes.get_errno()"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import os\nopen('a', 'w').write('x')\nos.mkdir('b')\nos.rename('a', 'b/a')\nassert open('b/a').read()",
        "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(b'x')",
        "import sys\nassert sys.stdin.read() == ''\nprint('x' * 10**6)\nprint('y', file=sys.stderr)",
        "import threading\nt = threading.Thread(target=lambda: None)\nt.start(); t.join()",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",  # left behind
        "import numpy as np\nassert np.arange(3).sum() == 3",
        "import math, collections, itertools, re, hashlib, datetime, functools, typing, random, heapq, json",
    ],
)
def test_ordinary_programs_pass(program):
    assert outcome(program, CodeLimits(seconds=20.0, memory_mb=1024)) == PASSED


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended with code 0"),
        ("input()", "EOFError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("bytearray(10**10)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("open('a', 'wb').write(bytes(10**8))", "OSError"),
        ("assert False, '\\ud800'", r"AssertionError: \ud800"),
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.system('true')", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import urllib.request as r; r.urlopen('http://127.0.0.1:9')", "URLError"),
        ("import shutil, sys; shutil.rmtree(sys.prefix + '/none')", "PermissionError"),
        pytest.param("import resource as r; r.setrlimit(r.RLIMIT_AS, (2**40, 2**40))", "ValueError", marks=kernel),
        pytest.param(libc("fork()"), "AssertionError: 1", marks=kernel),
        pytest.param(libc("socket(2, 1, 0)"), "AssertionError: 1", marks=kernel),
        pytest.param(libc("kill(ctypes.c_int(1), 0)"), "AssertionError: 1", marks=kernel),
        pytest.param("import ctypes; ctypes.string_at(0)", f"ended with code {-signal.SIGSEGV}", marks=kernel),
    ],
)
def test_programs_that_fail_or_do_what_they_may_not(program, told):
    assert outcome(program, LIMITS).startswith(told)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(program):
    begun = time.monotonic()
    limits = CodeLimits(seconds=1.0, memory_mb=512)
    assert outcome(f"try:\n    {program}\nexcept BaseException: pass\n{program}", limits) == "timed out"
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'here')",
        "import os; os.symlink({path!r}, 'link'); open('link', 'w')",
        "import os; os.chmod({path!r}, 0)",
        pytest.param("import ctypes; ctypes.CDLL(None).unlink({path!r}.encode())", marks=kernel),
        pytest.param("import ctypes; ctypes.CDLL(None).truncate({path!r}.encode(), 0)", marks=kernel),
        pytest.param("import ctypes; ctypes.CDLL(None).chmod({path!r}.encode(), 0)", marks=kernel),
    ],
)
def test_files_elsewhere_stay_what_they_are(tmp_path, program):
    path = tmp_path / "file"
    path.write_text("content")
    mode = path.stat().st_mode
    outcome(program.format(path=str(path)), LIMITS)
    assert path.read_text() == "content"
    assert path.stat().st_mode == mode
    assert os.listdir(tmp_path) == ["file"]
