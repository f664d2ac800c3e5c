"""A command in a process of its own: start it, read what it says, wait for a line, signal it."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_POLL_S = 0.002
_LIMIT_S = 300.0  # a child that takes longer hangs


class ChildError(Exception):
    """A process under test did not do what it must; the text has its output."""


class Child:
    """A command in a process of its own; its output goes to files as it comes.

    Leaving the context kills the process, if it still runs.

    Args:
        command: program and arguments.
        environment: all of it.
        log: `<log>.out` and `<log>.err` are written.
        stdout: is written instead of `<log>.out`; where it is a pipe, `out` can't be read.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        stdout: Path | None = None,
    ) -> None:
        self._out, self._err = stdout or log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, env=dict(environment), cwd=log.parent
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def out(self) -> str:
        """What it has written to stdout by now."""
        return self._out.read_text(errors="replace")

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
        """Has it not ended yet?"""
        return self.process.poll() is None

    def wait_for(self, start: str) -> None:
        """Returns when a line of stdout begins so; ChildError when the process ends before."""
        deadline = time.monotonic() + _LIMIT_S
        while True:
            is_running = self.is_running()  # before the look, so that no line is missed
            if any(line.startswith(start) for line in self.out.splitlines(keepends=True)):
                return
            if not is_running or time.monotonic() > deadline:
                raise ChildError(f"no line {start!r}; {self.said}")
            time.sleep(_POLL_S)

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Returns when it stands still, until it gets SIGCONT."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def kill(self) -> bool:
        """Kills it; False when it had ended by itself before."""
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit code, when it has ended; ChildError when it hangs."""
        try:
            return self.process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise ChildError(f"no end after {_LIMIT_S:g} s; {self.said}") from None
