"""Output that fails must neither end a run nor change its exit code."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_disk import fill, small_disk

from jaxsft.common.console import make_console

# More than the buffer of stdout holds: it is full at the exit.
PRINTING = """
import sys
from jaxsft.common.console import make_console

console = make_console()
for step in range(200):
    console.print(f"step {step} " + "x" * 100)
sys.exit(75)
"""


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)  # ENOSPC


def pipe_without_reader() -> int:
    reader, writer = os.pipe()  # EPIPE
    os.close(reader)
    return writer


def terminal_that_hung_up() -> int:
    user, terminal = pty.openpty()  # EIO
    os.close(user)
    return terminal


@pytest.mark.parametrize("broken", [full_disk, pipe_without_reader, terminal_that_hung_up])
def test_a_process_keeps_its_exit_code(broken):
    output = broken()
    command = [sys.executable, "-c", PRINTING]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("PYTHONUNBUFFERED", None)
    try:
        only_stdout = subprocess.run(
            command, stdout=output, stderr=subprocess.PIPE, env=environment, text=True
        )
        both = subprocess.run(command, stdout=output, stderr=output, env=environment)
    finally:
        os.close(output)
    assert (only_stdout.returncode, only_stdout.stderr) == (75, "")
    assert both.returncode == 75


def test_printing_goes_on_when_there_is_room_again(monkeypatch):
    with small_disk(2**16) as disk, (disk / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        console = make_console()
        filler = fill(disk)
        for _ in range(200):
            console.print("x" * 100)
        assert (disk / "log").stat().st_size == 0  # nothing of it could be written
        filler.unlink()
        console.print("room again")
        assert (disk / "log").read_text().endswith("\nroom again\n")


def test_the_console_is_what_stdout_is(monkeypatch):
    ascii_stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_stdout)
    console = make_console()
    console.print("[brackets] … " + "x" * 200)
    assert ascii_stdout.buffer.getvalue() == b"[brackets] ... " + b"x" * 200 + b"\n"
    assert console.encoding == "ascii" and not console.is_terminal and console.soft_wrap

    user, terminal = pty.openpty()
    with open(user, "rb"), open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert make_console().file.isatty() and make_console().file.fileno() == terminal

    monkeypatch.setattr(sys, "stdout", None)  # started without one: python … >&-
    make_console().print("dropped")
