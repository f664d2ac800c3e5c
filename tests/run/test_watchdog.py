"""Processes that hang end by themselves, say where, and leave nothing running."""

import faulthandler
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxsft.run.watchdog import Watchdog

ADVICE = "the checkpoint of step 100 is good"
HANGING = f"""
import ctypes, os, sys, threading, time
from jaxsft.run.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

def holds_the_interpreter_lock():
    ctypes.PyDLL(None).pause()

with Watchdog(2.0, lambda: "{ADVICE}") as watchdog:
    watchdog.beat("step 123")
    while len(os.listdir("/proc/self/task")) < 3:  # its own thread and faulthandler's
        time.sleep(0.01)
    globals()[sys.argv[1]]()
"""
DISARMED = """
import os, time
from jaxsft.run.watchdog import Watchdog

def num_threads():  # faulthandler's too, which Python doesn't list
    return len(os.listdir("/proc/self/task"))

with Watchdog(None, str) as watchdog:
    watchdog.beat("step 1")
    assert num_threads() == 1
with Watchdog(1000.0, str):
    pass
for _ in range(1000):  # a thread that was joined is in the list for a moment longer
    if num_threads() == 1:
        break
    time.sleep(0.01)
assert num_threads() == 1
"""


def start(script, *args, stderr=subprocess.PIPE):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stderr=stderr,
        text=True,
        env=environment,
        start_new_session=True,
    )


def nearly_full_pipe(spare_bytes):
    """(reader, writer) of a pipe that takes only so much more."""
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - spare_bytes))
    return reader, writer


def test_a_hanging_process_ends_and_says_where():
    deaf = [nearly_full_pipe(0), nearly_full_pipe(256)]  # without a word; in the stacks
    hanging = start(HANGING, "waits_for_ever")
    holding = start(HANGING, "holds_the_interpreter_lock")
    unheard = [start(HANGING, "waits_for_ever", stderr=writer) for _, writer in deaf]

    said = hanging.communicate()[1]
    assert hanging.returncode == 1
    assert said.splitlines()[0] == (
        f"error: stuck for 2 seconds in step 123; {ADVICE}; stacks of all threads follow"
    )
    assert "in waits_for_ever" in said and "watchdog.py" in said  # all threads
    # Nothing of its session is left.
    with pytest.raises(ProcessLookupError):
        os.killpg(hanging.pid, 0)

    said = holding.communicate()[1]
    assert holding.returncode == 1
    assert "in holds_the_interpreter_lock" in said

    assert [process.wait() for process in unheard] == [1, 1]
    for end in (end for pipe in deaf for end in pipe):
        os.close(end)


def test_nothing_is_armed_before_and_after():
    process = start(DISARMED)
    assert (process.communicate()[1], process.returncode) == ("", 0)


def test_beats_start_the_time_anew(monkeypatch):
    now_s, looked, codes, is_over = 0.0, threading.Condition(), [], threading.Event()

    def clock():
        with looked:
            looked.notify_all()
            return now_s

    def exit_process(code):
        nonlocal now_s
        codes.append(code)
        now_s = 0.0  # not again
        is_over.set()

    def move_clock(to_s):
        nonlocal now_s
        with looked:
            now_s = to_s
            looked.wait()  # the watching thread reads the new time,
            looked.wait()  # and again, so it has acted on the first reading

    monkeypatch.setattr("jaxsft.run.watchdog.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    with Watchdog(0.01, str) as watchdog:
        move_clock(0.009)
        watchdog.beat("step 1")
        move_clock(0.009)  # the thread may have looked at the old beat, and not yet at the clock
        move_clock(0.018)
        assert codes == []
        now_s = 0.02
        is_over.wait()
    assert codes == [1]
