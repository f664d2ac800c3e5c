"""Runs programs that nobody has read, each in a confined process. A script for a subprocess.

It imports the standard library only. `sandbox.py` starts it once, without site-packages or the
user's environment, and sends it one message a program with two open files: a job to read, a pipe
for its answers. The script forks, and the child reads the job. So this process never holds a
program, and none can find another's in its memory.

A program may write what it likes into its pipe. All that an answer can be is the program's own
claim about an expression; what the right value is, no process that runs a program ever knows.
"""

import array
import collections
import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import random
import resource
import selectors
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

# What a computation in Python needs of the kernel, by its numbers on each machine. No open, stat,
# socket, exec, clone, kill, ptrace, prctl, sleep or wait: a program can neither reach anything nor
# block. `futex` is missing as nothing but a deadlock waits for it in a single thread.
SYSTEM_CALLS = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12},
        **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "mremap": 25},
        **{"sched_yield": 24, "madvise": 28, "getpid": 39, "exit": 60, "gettimeofday": 96},
        **{"getrusage": 98, "times": 100, "sigaltstack": 131, "gettid": 186, "time": 201},
        **{"restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "exit_group": 231},
        "getrandom": 318,
    },
    "aarch64": {
        **{"read": 63, "write": 64, "close": 57, "mmap": 222, "mprotect": 226, "munmap": 215},
        **{"brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139},
        **{"mremap": 216, "sched_yield": 124, "madvise": 233, "getpid": 172, "exit": 93},
        **{"gettimeofday": 169, "getrusage": 165, "times": 153, "sigaltstack": 132, "gettid": 178},
        **{"restart_syscall": 128, "clock_gettime": 113, "clock_getres": 114, "exit_group": 94},
        "getrandom": 278,
    },
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused: EPERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06

# What solutions import. Once confined, a process can't open a file, so no further module loads.
MODULES = (
    *("abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "codecs"),
    *("collections", "collections.abc", "colorsys", "contextlib", "copy", "csv", "dataclasses"),
    *("datetime", "decimal", "difflib", "enum", "fractions", "functools", "graphlib", "hashlib"),
    *("heapq", "html", "inspect", "io", "itertools", "json", "keyword", "locale", "logging"),
    *("math", "numbers", "operator", "os", "pathlib", "platform", "pprint", "queue", "random"),
    *("re", "secrets", "shlex", "statistics", "string", "struct", "sys", "textwrap", "threading"),
    *("time", "timeit", "traceback", "types", "typing", "unicodedata", "uuid", "warnings"),
    *("zlib", "_strptime", "encodings.ascii", "encodings.latin_1", "encodings.utf_16"),
    *("encodings.utf_32", "encodings.idna", "encodings.hex_codec", "encodings.rot_13"),
    "encodings.unicode_escape",
)
JOB = struct.Struct("=Qdd")  # number, CPU seconds, MiB
END = struct.Struct("=QiId")  # number, wait status, 1 if stopped for its time, CPU seconds
READY = b"ready"
_WALL_SECONDS = 4.0
_STALLED = 0.05  # of a core: less, and the process does not compute but waits
_MAX_DEPTH = 60  # lists in lists
_MAX_NODES = 10_000  # numbers, texts and containers in one value
_MAX_HASHED = 1_000  # items of a set, keys of a dict: more could be made to collide
_MAX_TEXT = 100_000  # characters of a text
_MAX_BITS = 14_000  # of a whole number: as text, Python reads 4,300 digits
_ITERABLES: tuple[type, ...] = (
    *(range, type({}.keys()), type({}.values()), type({}.items()), collections.deque, array.array),
)
_PLAIN = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


class NotPlainError(ValueError):
    """A value that does not travel: no plain Python value, too big, or too deep."""


class _UnreadableError(Exception):
    """A program that is no Python."""


def encode_value(value: Any) -> Any:
    """A plain value as what JSON holds, exactly: types, NaN and lone surrogates survive.

    An object of a subclass (defaultdict, namedtuple, IntEnum) travels as its base, read by the
    base's own methods; a fraction or decimal as a number; an iterator as its items.

    Raises:
      NotPlainError: it is none of these, or too much.
    """
    room = _MAX_NODES

    def encode(value: Any, depth: int) -> Any:
        nonlocal room
        room -= 1
        if room < 0 or depth > _MAX_DEPTH:
            raise NotPlainError("too big")
        if value is None or value is True or value is False:
            return value
        kind: Any = next((each for each in _PLAIN if each in type(value).__mro__), None)
        if kind is int:
            if int.bit_length(value) > _MAX_BITS:
                raise NotPlainError("too big")
            return int.__add__(value, 0)
        if kind is float:
            return float.__mul__(value, 1.0)
        if kind in (str, bytes) and kind.__len__(value) > _MAX_TEXT:
            raise NotPlainError("too big")
        if kind is str:
            return str.__str__(value)
        if kind is bytes:
            return {"bytes": bytes.hex(value)}
        if kind is complex:
            return {"complex": [complex.real.__get__(value), complex.imag.__get__(value)]}
        if kind is dict:
            pairs = dict.items(value)
            return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in pairs]}
        if kind is not None:
            items = [encode(each, depth + 1) for each in kind.__iter__(value)]
            return items if kind is list else {kind.__name__: items}
        name = type(value).__name__
        if name in ("Fraction", "Decimal") and type(value).__module__ in ("fractions", "decimal"):
            return encode(int(value) if value == int(value) else float(value), depth)
        if hasattr(type(value), "__next__") or type(value) in _ITERABLES:
            return {"iterator": [encode(each, depth + 1) for each in value]}
        raise NotPlainError(name)

    return encode(value, 0)


def decode_value(encoded: Any) -> Any:
    """The value of `encode_value`; what an untrusted process wrote costs bounded time and memory.

    What this returns can be encoded.

    Raises:
      ValueError, TypeError: it is no encoded value (TypeError: a set of lists, say).
    """
    room = _MAX_NODES

    def decode(node: Any, depth: int) -> Any:
        nonlocal room
        room -= 1
        if room < 0 or depth > _MAX_DEPTH:
            raise ValueError("too big")
        if isinstance(node, list):
            return [decode(each, depth + 1) for each in node]
        if isinstance(node, str) and len(node) > _MAX_TEXT:
            raise ValueError("too big")
        if isinstance(node, int) and node.bit_length() > _MAX_BITS:
            raise ValueError("too big")
        if not isinstance(node, dict):
            return node
        ((kind, content),) = node.items()
        if kind == "bytes" and len(content) <= 2 * _MAX_TEXT:
            return bytes.fromhex(content)
        if kind == "complex":
            return complex(*map(float, content))
        if kind in ("set", "frozenset", "dict") and len(content) > _MAX_HASHED:
            raise ValueError("too big")
        if kind == "dict":
            return {decode(k, depth + 1): decode(v, depth + 1) for k, v in content}
        makers: dict[str, Any] = {
            "tuple": tuple,
            "set": set,
            "frozenset": frozenset,
            "iterator": iter,
        }
        if kind not in makers:
            raise ValueError("an unknown kind of value")
        return makers[kind]([decode(each, depth + 1) for each in content])

    return decode(encoded, 0)


class _Instruction(ctypes.Structure):
    _fields_ = (
        *(("code", ctypes.c_ushort), ("jump_true", ctypes.c_ubyte), ("jump_false", ctypes.c_ubyte)),
        ("operand", ctypes.c_uint32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _make_filter(machine: str) -> _Filter:
    """The allow list as a BPF program over `struct seccomp_data` (linux/seccomp.h)."""
    program = [
        *((_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL)),
        (_LOAD, 0, 0, 0),
    ]
    for number in sorted(SYSTEM_CALLS[machine].values()):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _REFUSE))
    array_type = _Instruction * len(program)
    return _Filter(len(program), array_type(*(_Instruction(*each) for each in program)))


class _Confinement:
    """What a child does to itself before it sees a program. Made once, before the forks."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._filter = _make_filter(platform.machine())
        self._parent = os.getpid()

    def _prctl(self, option: int, *arguments: Any) -> None:
        wide = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
        if self._libc.prctl(option, *wide, *[ctypes.c_ulong(0)] * (4 - len(wide))):
            raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")

    def leave_everything(self, keep: int) -> None:
        """A session and a group of its own, no files but `keep`, gone when the script is."""
        os.setsid()
        self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != self._parent:
            os._exit(1)
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, keep)
        os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    def limit(self, cpu_seconds: float, megabytes: float) -> None:
        """Bounds on what the kernel counts, then no system call but those of the list."""
        for what, most in (
            (resource.RLIMIT_CPU, int(cpu_seconds) + 2),  # behind the script's own, finer watch
            (resource.RLIMIT_AS, int(megabytes) << 20),
            *((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 8)),
        ):
            resource.setrlimit(what, (most, most))
        self._prctl(_PR_SET_NO_NEW_PRIVS, 1)
        self._prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(self._filter))

    def why_not(self) -> str:
        """Tries it all in a child: why programs can't be confined here, "" if they can."""
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                self.leave_everything(keep=writer)
                self.limit(1, 512)
                try:
                    os.open("/", os.O_RDONLY)
                    os.write(writer, b"the filter does not hold")
                except PermissionError:
                    os.write(writer, READY)
            except BaseException as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            said = file.read()
        os.waitpid(pid, 0)
        return "" if said == READY else said.decode() or "the kernel ended the trial"


def _error_of(error: BaseException) -> list[str]:
    """A raised error as the answer that names it. Its class is the program's own, and may lie."""
    if isinstance(error, NotPlainError):
        return ["not plain"]
    if isinstance(error, _UnreadableError):
        return ["syntax"]
    if isinstance(error, NameError) and type(error.name) is str:
        return ["raised", "NameError", error.name]
    if isinstance(error, PermissionError):
        return ["forbidden"]
    return ["memory"] if isinstance(error, MemoryError) else ["raised", type(error).__name__]


def _answers(job: dict[str, Any]) -> Iterator[list[Any]]:
    """Runs the program; yields what its expressions give, in their order."""
    module = types.ModuleType("solution")  # dataclasses look their module up
    sys.modules["solution"] = module
    space = module.__dict__
    space.update({name: decode_value(value) for name, value in job["values"].items()})
    setup = compile(job["setup"], "<setup>", "exec")
    try:
        code = compile(job["code"], "<solution>", "exec")
    except Exception as error:  # a SyntaxError, a null byte, too many brackets
        raise _UnreadableError from error
    try:
        exec(setup, space)  # noqa: S102 - this is what the confinement is for
        early = True
    except NameError:  # it uses what the solution defines
        early = False
    exec(code, space)  # noqa: S102
    if not early:
        exec(setup, space)  # noqa: S102
    for call in job["calls"]:
        try:
            answer = ["value", encode_value(eval(call, space))]  # noqa: S307
        except BaseException as error:
            answer = _error_of(error)
        yield answer


def _run_child(confinement: _Confinement, files: list[int], cpu: float, mib: float) -> None:
    """Runs one program. Never returns: whatever it does, the process ends here."""
    try:
        job_file, pipe = files
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with open(job_file, "rb", closefd=False) as file:
            job = json.loads(file.read())
        confinement.leave_everything(keep=pipe)
        confinement.limit(cpu, mib)
        del file, confinement
        random.seed(0)  # the same program earns the same again

        def say(answer: list[Any]) -> None:
            data = memoryview(json.dumps(answer).encode() + b"\n")
            while data:
                data = data[os.write(pipe, data) :]

        try:
            for number, answer in enumerate(_answers(job)):
                say([number, *answer])
        except BaseException as error:
            say([-1, *_error_of(error)])
    finally:
        os._exit(0)


class _Child:
    """A running program and its limits: CPU time, and the wall clock if it does not compute."""

    def __init__(self, number: int, pid: int, cpu_seconds: float) -> None:
        self.number, self.pid, self.limit = number, pid, cpu_seconds
        self.stopped = False
        self._clock = (~pid << 3) | 2  # the process's CPU clock, as clock_getcpuclockid gives it
        self._window_end, self._used_before = time.monotonic() + _WALL_SECONDS, 0.0
        self.next_look = 0.0
        self.look()

    def look(self) -> None:
        """Stops the program if its time is over; else says when to look again."""
        if self.stopped:
            return
        try:
            now, used = time.monotonic(), time.clock_gettime(self._clock)
        except OSError:  # it has just ended
            return
        if now >= self._window_end:  # a busy machine may give it little, but not this little
            self.stopped = used - self._used_before < _STALLED * _WALL_SECONDS
            self._window_end, self._used_before = now + _WALL_SECONDS, used
        if self.stopped or used >= self.limit:
            self.stopped = True
            self.kill()
        self.next_look = min(now + max(self.limit - used, 0.001), self._window_end)

    def kill(self) -> None:
        """Kills the process and its group: as it isn't yet waited for, the ids are its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # no group before its setsid
        os.kill(self.pid, signal.SIGKILL)


def _serve(control: socket.socket, confinement: _Confinement) -> None:
    """Starts a child for each message, watches their time, reports their ends; returns at EOF."""
    wake_reader, wake_writer = os.pipe()
    for end in (wake_reader, wake_writer):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_reader, selectors.EVENT_READ)
        while True:
            looks = [child.next_look for child in children.values() if not child.stopped]
            wait = max(0.0, min(looks) - time.monotonic()) if looks else None
            ready = {key.fileobj for key, _ in selector.select(wait)}
            if wake_reader in ready:
                os.read(wake_reader, 4096)
            for child in [*children.values()]:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    del children[pid]
                    used = usage.ru_utime + usage.ru_stime
                    control.send(END.pack(child.number, status, child.stopped, used))
                elif child.next_look <= time.monotonic():
                    child.look()
            if control in ready:
                message, files = _receive(control)
                if not message:
                    break
                number, cpu_seconds, megabytes = JOB.unpack(message)
                if (pid := os.fork()) == 0:
                    _run_child(confinement, files, cpu_seconds, megabytes)
                children[pid] = _Child(number, pid, cpu_seconds)
                for file in files:
                    os.close(file)
    for child in children.values():
        child.kill()


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the two open files with it."""
    files = array.array("i")
    message, extra, _, _ = control.recvmsg(JOB.size, socket.CMSG_SPACE(2 * files.itemsize))
    for _, _, data in extra:
        files.frombytes(data)
    return message, files.tolist()


def _main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    os.chdir("/")
    os.environ.clear()  # the hash seed, and LC_CTYPE, which Python sets
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in MODULES:
        importlib.import_module(name)
    sys.argv = [""]
    confinement = _Confinement()
    said = confinement.why_not().encode() or READY
    control.send(said)
    if said == READY:
        gc.collect()
        gc.freeze()  # a child's collector leaves the shared pages alone
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            _serve(control, confinement)


if __name__ == "__main__":
    _main()
