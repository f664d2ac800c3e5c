"""A command in a process of its own: start it, read what it says, wait for a line, signal it."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

# A shell's background ignores SIGINT, nohup SIGHUP, and children inherit that.
HEARS_SIGNALS = ("env", "--default-signal=HUP,INT,TERM")
_POLL_S = 0.002
_LIMIT_S = 1800.0  # a child that takes longer hangs
_PAGE_BYTES = 4096  # the least that a pipe holds


class ChildError(Exception):
    """A process under test did not do what it must; the text has its output."""


class Child:
    """A command in a process of its own, which signals stop whatever its parents ignore.

    Its stdout is a pipe that holds one write, and it waits while that is not read. So a process
    of which a line was awaited is two lines further at most, however late we see the line.

    Leaving the context kills the process, if it still runs.

    Args:
        command: program and arguments.
        environment: all of it.
        log: `<log>.err` gets its stderr.
        stdout: is written instead of the pipe, freely; `out` stays empty.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        stdout: Path | None = None,
    ) -> None:
        self._bytes, self._err = bytearray(), log.with_suffix(".err")
        read_end, write_end = os.pipe2(os.O_DIRECT)  # each write is one read
        fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, _PAGE_BYTES)
        os.set_blocking(read_end, False)
        self._pipe = open(read_end, "rb", buffering=0)  # noqa: SIM115 (__exit__ closes it)
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(open(write_end, "wb"))
            if stdout is not None:
                out = stack.enter_context(stdout.open("wb"))
            err = stack.enter_context(self._err.open("wb"))
            self.process = subprocess.Popen(
                [*HEARS_SIGNALS, *command],
                stdout=out,
                stderr=err,
                env=dict(environment),
                cwd=log.parent,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._pipe.close()

    @property
    def out(self) -> str:
        """What it has written to stdout by now."""
        self._read_all()
        return self._written()

    @property
    def err(self) -> str:
        """What it has written to stderr by now."""
        return self._err.read_text(errors="replace")

    @property
    def said(self) -> str:
        """How it ended, or that it runs, and its last words."""
        out, err = self.out.splitlines(), self.err.splitlines()
        last = " | ".join([*out[-3:], *err[-3:]])
        return f"exit code {self.process.poll()}, {len(err)} lines of stderr, last: {last}"

    def is_running(self) -> bool:
        """Has it not ended yet? What it has written is read, so that it goes on."""
        has_ended = self.process.poll() is not None  # before the look, so that no line is missed
        self._read_all()
        return not has_ended

    def wait_for(self, start: str) -> None:
        """Returns when a line of stdout begins so; ChildError when the process ends before."""
        deadline = time.monotonic() + _LIMIT_S
        while not any(line.startswith(start) for line in self._written().splitlines()):
            has_ended = self.process.poll() is not None or time.monotonic() > deadline
            if not self._read():
                if has_ended:
                    raise ChildError(f"no line {start!r}; {self.said}")
                time.sleep(_POLL_S)

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def freeze(self) -> bool:
        """Returns when it stands still, until it gets SIGCONT; False when it had ended before."""
        self.process.send_signal(signal.SIGSTOP)
        if self.process.returncode is not None:
            return False
        # WNOWAIT leaves its exit code to others.
        seen = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return seen.si_code == os.CLD_STOPPED

    def kill(self) -> bool:
        """Kills it; False when it had ended by itself before."""
        self.process.kill()
        code = self.process.wait()
        self._read_all()
        return code == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit code, when it has ended; ChildError when it hangs."""
        deadline = time.monotonic() + _LIMIT_S
        while self.is_running():
            if time.monotonic() > deadline:
                raise ChildError(f"no end after {_LIMIT_S:g} s; {self.said}")
            time.sleep(_POLL_S)
        return self.process.returncode

    def _read(self) -> bool:
        """Takes in one write, if there is one."""
        written = None if self._pipe.closed else self._pipe.read(_PAGE_BYTES)
        self._bytes += written or b""
        return bool(written)

    def _read_all(self) -> None:
        while self._read():
            pass

    def _written(self) -> str:
        return self._bytes.decode(errors="replace")
