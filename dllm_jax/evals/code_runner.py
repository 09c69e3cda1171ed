"""Runs one program of a model behind limits. A script of its own, which imports nothing but the standard library.

It reads a JSON object from stdin: `program`, `folder` (where it runs, and all that it may write to), `seconds`,
`memory` and `file_bytes` (bytes). It prints `{"outcome": "passed"}`, or what the program failed with. Before the
program starts, for this process and for good:

- resource limits: processor time, memory, size of files, open files, no core dump;
- on Linux no capabilities and no new privileges; Landlock (where the kernel has it): writes below the folder only;
  a filter of system calls (x86_64, aarch64): no sockets, no other processes, no signals, no change of permissions;
- everywhere a hook on Python's own events, which refuses the same.

It holds back code that goes wrong, not a program written to break out of all that.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

# Numbers of system calls, x86_64 and aarch64 (0: it has none). Those without a line here are allowed.
_REFUSED = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "io_uring_setup": (425, 425),
    "fork": (57, 0),
    "vfork": (58, 0),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "chmod": (90, 0),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, 0),
    "fchown": (93, 55),
    "lchown": (94, 0),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "utimensat": (280, 88),
    "utimes": (235, 0),
    "truncate": (76, 45),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "shmget": (29, 194),
    "mq_open": (240, 180),
    "bpf": (321, 280),
    "keyctl": (250, 219),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_AUDIT_ARCH = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_CLONE_THREAD, _EPERM, _ENOSYS = 0x00010000, 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_WRITES = (1 << 1) | sum(1 << bit for bit in range(4, 13))  # write, remove, make
_LANDLOCK_LATER = {2: 1 << 13, 3: 1 << 14}  # by the version that knows it: move elsewhere, truncate
_REFUSED_EVENTS = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
_WRITING_EVENTS = {
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move",
}  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Reads the order, sets the limits, runs the program, prints the outcome."""
    order = json.loads(sys.stdin.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.chdir(order["folder"])
    _limit(seconds=order["seconds"], memory=order["memory"], file_bytes=order["file_bytes"])
    if sys.platform == "linux":
        _confine(order["folder"])
    _watch(order["folder"])
    signal.setitimer(signal.ITIMER_REAL, order["seconds"])  # ends the process; who called it waits longer
    try:
        exec(compile(order["program"], "program.py", "exec"), {"__name__": "__main__"})
        outcome = "passed"
    except BaseException as error:  # SystemExit too: the tests behind it did not run
        outcome = f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ").encode(errors="backslashreplace").decode()
    os.write(answer, json.dumps({"outcome": outcome}).encode())
    os._exit(0)  # whatever threads and handlers the program has left


def _limit(*, seconds: float, memory: int, file_bytes: int) -> None:
    """Limits of the resources; one that the system does not know is left out."""
    wanted = {"CPU": int(seconds) + 1, "AS": memory, "FSIZE": file_bytes, "NOFILE": 64, "CORE": 0}
    if sys.platform != "linux":  # there a filter of system calls does this, and threads remain possible
        wanted["NPROC"] = 0
    for name, value in wanted.items():
        try:
            number = getattr(resource, f"RLIMIT_{name}")
            _, most = resource.getrlimit(number)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            hard = (
                value + 1 if name == "CPU" and (most == resource.RLIM_INFINITY or value < most) else value
            )  # a signal that tells, then the end
            resource.setrlimit(number, (value, hard))
        except (AttributeError, OSError, ValueError):
            continue


def _confine(folder: str) -> None:
    """What the kernel enforces, as far as it can; the hook remains where it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)  # capset: version 3, this process; no capability
    libc.capset(ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(none, 24))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _restrict_writes(libc, folder)
    numbers = _AUDIT_ARCH.get(platform.machine())
    if numbers:
        _filter_calls(libc, *numbers)


def _restrict_writes(libc: ctypes.CDLL, folder: str) -> None:
    """Landlock: no writing, making and removing outside the folder, but for the null device."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    writes = _LANDLOCK_WRITES | sum(bit for since, bit in _LANDLOCK_LATER.items() if version >= since)
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", writes), ctypes.c_size_t(8), 0)
    if rules < 0:
        return
    for path, allowed in ((folder, writes), (os.devnull, 1 << 1)):
        opened = os.open(path, os.O_PATH)
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    libc.syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _filter_calls(libc: ctypes.CDLL, arch: int, column: int) -> None:
    """Seccomp: the calls in `_REFUSED` fail with EPERM; a new process does, a new thread does not."""

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    fail, allow = 0x00050000, 0x7FFF0000
    steps = [op(load, 4), op(equal, arch, 1, 0), op(give, fail | _EPERM), op(load, 0)]
    for numbers in _REFUSED.values():
        if numbers[column]:
            steps += [op(equal, numbers[column], 0, 1), op(give, fail | _EPERM)]
    steps += [op(equal, _CLONE3[column], 0, 1), op(give, fail | _ENOSYS)]  # then libc falls back to clone
    steps += [op(equal, _CLONE[column], 0, 3), op(load, 16), op(has, _CLONE_THREAD, 1, 0), op(give, fail | _EPERM)]
    steps += [op(give, allow)]
    if column == 0:  # x86_64 has a second table of calls, from 0x40000000 on
        steps[4:4] = [op(0x35, 0x40000000, 0, 1), op(give, fail | _EPERM)]
    program = ctypes.create_string_buffer(b"".join(steps), 8 * len(steps))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc.prctl(22, 2, ctypes.byref(head), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _watch(folder: str) -> None:
    """Refuses Python's own events of what is not allowed."""
    inside = os.path.realpath(folder) + os.sep

    def is_outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return name != os.devnull and not (name + os.sep).startswith(inside)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_REFUSED_EVENTS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and len(arguments) == 3:
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITE_FLAGS and is_outside(path):
                raise PermissionError("writing there is not allowed")
        elif event in _WRITING_EVENTS and any(is_outside(path) for path in arguments if isinstance(path, str | bytes)):
            raise PermissionError(f"{event} is not allowed there")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
