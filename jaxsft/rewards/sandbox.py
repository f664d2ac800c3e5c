"""Runs programs that a model wrote: confined, several at a time, with values as the only result.

What a program can do is in `sandbox_worker.py`. This side starts that script, hands it a job and a
pipe for each program, and reads the pipes. A program's answers are claims: they are compared with
the right values here, where no program is. Nothing that comes through a pipe is trusted to be an
answer, and it is read at bounded cost.
"""

import contextlib
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxsft.config import RewardOptions
from jaxsft.rewards import sandbox_worker
from jaxsft.rewards.sandbox_worker import END, JOB, READY, decode_value, encode_value

_MAX_OUTPUT = 1 << 20  # bytes of answers of one program
_START_SECONDS = 60.0
_TIMEOUT = "timeout"
_ERRORS = {
    **{"syntax": "syntax", "memory": "memory", "forbidden": "forbidden call"},
    "not plain": "not a plain value",
}


class SandboxJob(NamedTuple):
    """Code and the expressions to evaluate after it has run.

    Attributes:
      code: the program.
      setup: code that runs before it; after it, if it uses names that the program defines.
      calls: expressions.
      values: names that hold these plain values when the program starts.
    """

    code: str
    setup: str = ""
    calls: tuple[str, ...] = ()
    values: Mapping[str, Any] = {}


class Outcome(NamedTuple):
    """What an expression gave: a plain value, or why there is none.

    Attributes:
      value: the value, of Python's own types; an iterator stands for any iterator.
      error: "" if there is a value; else "syntax", "timeout", "memory", "forbidden call",
        "raised NAME", "no NAME" (a name that isn't defined), "not a plain value", "exited",
        "crashed", "no answer".
    """

    value: Any
    error: str


class Sandbox:
    """A context manager that runs programs. Enter it before JAX starts.

    Each program has `first_seconds` of CPU time. Those that need more run once more, with an equal
    share of `spare_seconds`, at most `cpu_seconds` each, unless that is less than twice as much.
    So a slow solution has `cpu_seconds` unless many others hang, and n programs cost at most
    n × first_seconds + spare_seconds of CPU time, whatever they do. As the limits are of CPU time,
    what else the machine does changes no outcome.

    Args:
      cpu_seconds: what a program may take. A solution of MBPP takes 0.002 in the median.
      first_seconds: a twentieth of `cpu_seconds` by default.
      spare_seconds: by default enough for six slow programs.
      megabytes: of memory, for each program.
      workers: programs at a time; one for each core of this process by default.

    Raises, when entered:
      ValueError: programs can't be confined on this machine.
    """

    def __init__(
        self,
        *,
        cpu_seconds: float = RewardOptions.code_seconds,
        first_seconds: float | None = None,
        spare_seconds: float | None = None,
        megabytes: float = 512,
        workers: int | None = None,
    ) -> None:
        first = cpu_seconds / 20 if first_seconds is None else first_seconds
        spare = cpu_seconds * 6 if spare_seconds is None else spare_seconds
        self._limits = cpu_seconds, first, spare
        self._megabytes = megabytes
        self._workers = workers
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._number = 0  # of the last program, so that no report is taken for another's

    def __enter__(self) -> Self:
        where = f"{platform.system()} {platform.machine()}"
        why = "no allow list of system calls is known for it"
        if sys.platform == "linux" and platform.machine() in sandbox_worker.SYSTEM_CALLS:
            why = self._start()
        if why:
            self._stop()
            raise ValueError(
                f"rewards: programs can't be run safely on this machine ({where}: {why}): the "
                "sandbox needs Linux with seccomp on x86-64 or aarch64; use such a machine, or "
                "leave out the reward tests"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, programs: Sequence[SandboxJob]) -> list[list[Outcome]]:
        """The outcomes of each program's calls, in order. No program can make this raise.

        If the helper process ends, the programs that ran in it count as failed, and the others go
        on in a new one.

        Raises:
          RuntimeError: no new one can be started.
        """
        most, first, spare = self._limits
        jobs = [_job(program) for program in programs]
        outcomes = self._run_all(jobs, first)
        slow = [i for i, each in enumerate(outcomes) if each and each[-1].error == _TIMEOUT]
        share = min(most, spare / max(1, len(slow)))
        if share >= 2 * first:
            again = self._run_all([jobs[i] for i in slow], share)
            for i, each in zip(slow, again, strict=True):
                outcomes[i] = each
        return outcomes

    def _start(self) -> str:
        """Starts the helper: why it could not, "" if it could."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -I would not read the seed, and with it go the orders of sets, and so rewards. With no
        # other variable -s and -P isolate as much.
        options = ["-s", "-P", "-S", "-B", "-X", "utf8", "-W", "ignore"]
        with theirs:
            self._helper = subprocess.Popen(
                [sys.executable, *options, sandbox_worker.__file__, str(theirs.fileno())],
                env={"PYTHONHASHSEED": "0"},
                cwd=Path("/"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is this process's; the helper ends with it
            )
        self._control = ours
        ours.settimeout(_START_SECONDS)
        try:
            said = ours.recv(4096)
        except OSError as error:
            return f"its helper says nothing, {error}"
        ours.settimeout(None)
        return "" if said == READY else said.decode() or "its helper ended at once"

    def _stop(self) -> None:
        """Ends the helper and all that runs in it; returns when they are gone."""
        if self._control:
            self._control.close()  # the helper kills its children and ends
        if self._helper:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._helper.wait(5)
            self._helper.kill()  # the kernel ends its children with it
            self._helper.wait()
        self._control = self._helper = None

    def _run_all(self, jobs: Sequence["_Job"], cpu_seconds: float) -> list[list[Outcome]]:
        """Runs the programs once, all with the same limit."""
        runs: list[_Run | None] = [None] * len(jobs)
        waiting = list(enumerate(jobs))[::-1]
        live: dict[int, _Run] = {}
        workers = self._workers or len(os.sched_getaffinity(0))
        try:
            while waiting or live:
                if not self._control and (why := self._start()):
                    raise RuntimeError(f"rewards: the sandbox ended and can't be started: {why}")
                while waiting and len(live) < workers and self._control:
                    place, job = waiting.pop()
                    self._number += 1
                    run = _Run(job)
                    runs[place] = live[self._number] = run
                    request = JOB.pack(self._number, cpu_seconds, self._megabytes)
                    self._send(request, run)
                if not self._wait(live):
                    self._stop()
                    for run in live.values():
                        run.close()
                    live.clear()
        finally:
            if live:  # an interrupt: what runs is ended, the next call starts afresh
                self._stop()
                for run in live.values():
                    run.close()
        return [run.outcomes() for run in runs if run]

    def _send(self, request: bytes, run: "_Run") -> None:
        assert self._control
        with contextlib.suppress(OSError):  # an ended helper is seen by `_wait`
            socket.send_fds(self._control, [request], run.files)
        for file in run.files:
            os.close(file)

    def _wait(self, live: dict[int, "_Run"]) -> bool:
        """Waits for answers or the end of a program; False if the helper has ended."""
        assert self._control
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            for number, run in live.items():
                if run.is_open:
                    selector.register(run.pipe, selectors.EVENT_READ, number)
            ready = [key.data for key, _ in selector.select()]
        for number in ready:
            if number is not None:
                live[number].read()
        if None in ready:
            try:
                report = self._control.recv(END.size)
            except OSError:
                report = b""
            if not report:
                return False
            number, status, was_stopped, _ = END.unpack(report)
            live.pop(number).end(status, bool(was_stopped))
        return True


class _Job(NamedTuple):
    """A program as the worker reads it, and how many answers it owes."""

    data: bytes
    num_calls: int


def _job(program: SandboxJob) -> _Job:
    values = {name: encode_value(value) for name, value in program.values.items()}
    data = json.dumps(program._asdict() | {"values": values}).encode()
    return _Job(data, len(program.calls))


class _Run:
    """One program in one process: its pipe, what came through it, and how it ended."""

    def __init__(self, job: _Job) -> None:
        self._num_calls = job.num_calls
        job_file = os.memfd_create("job")
        os.write(job_file, job.data)
        os.lseek(job_file, 0, os.SEEK_SET)
        self.pipe, writer = os.pipe()
        self.files = [job_file, writer]
        self.is_open = True
        self._said = bytearray()
        self._end = "no answer"  # the helper ended before the program

    def read(self) -> None:
        """Takes what is in the pipe; one that says too much is no longer listened to."""
        data = os.read(self.pipe, 1 << 16)
        self._said += data
        if not data or len(self._said) > _MAX_OUTPUT:
            self.close()

    def end(self, status: int, was_stopped: bool) -> None:
        """Takes the rest and notes how the process ended: nobody can write any more."""
        while self.is_open:
            self.read()
        if was_stopped or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            self._end = _TIMEOUT
        else:
            self._end = "crashed" if os.WIFSIGNALED(status) else "exited"

    def close(self) -> None:
        """Listens no longer: the writer gets an error."""
        if self.is_open:
            os.close(self.pipe)
            self.is_open = False

    def outcomes(self) -> list[Outcome]:
        """One for each call. The lines must be the calls' in their order: the rest is no answer."""
        found: list[Outcome] = []
        rest = self._end
        for line in self._said.split(b"\n")[:-1]:
            number, outcome = _read_line(line)
            if number == len(found) < self._num_calls:
                found.append(outcome)
            else:
                rest = outcome.error if number == -1 and outcome.error else "no answer"
                break
        return found + [Outcome(None, rest)] * (self._num_calls - len(found))


def _read_line(line: bytes | bytearray) -> tuple[int, Outcome]:
    """A line of a program as the call's number and outcome; (-2, …) if it is no such line."""
    try:
        number, kind, *details = json.loads(line)
        if kind == "value":
            return int(number), Outcome(decode_value(*details), "")
        if kind == "raised":
            return int(number), Outcome(None, _raised(*details))
        return int(number), Outcome(None, _ERRORS[kind])
    except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError):
        return -2, Outcome(None, "no answer")


def _raised(error: Any, missing: Any = "?") -> str:
    """What is said of an error, if these are names that may stand in a log."""
    if error == "NameError" and _is_name(missing):
        return f"no {missing}"
    return f"raised {error}" if _is_name(error) else "raised an error"


def _is_name(text: Any) -> bool:
    """Whether this is an identifier that may stand in a log."""
    return isinstance(text, str) and len(text) <= 60 and text.isascii() and text.isidentifier()
