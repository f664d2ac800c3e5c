"""The session's rule in numbers, what counts as a deadline, and signals within one process."""

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.child import HEARS_SIGNALS

from jaxsft.common.signals import catch_signals, interruptible, interrupts_kept
from jaxsft.config import TrainConfig
from jaxsft.run import fit_deadline
from jaxsft.run.preflight import TimedSteps
from jaxsft.run.session import Session, SessionEnd, StopNow, duration, session_end

NOW_S = 1_800_000_000.0  # 2027-01-15T08:00:00Z

# Signals while the main thread is in a C call, which Python's own handlers wait for.
BUSY = """
import ctypes
from jaxsft.common.signals import catch_signals, interruptible

sleep = ctypes.CDLL(None).usleep  # without the interpreter lock, as a step is
with interruptible(), catch_signals() as stopped:
    print("ready", flush=True)
    for _ in range(600):
        sleep(100_000)  # 0.1 s; Python's handlers run between two of them
        if stopped():
            break
    print("stopped", flush=True)
"""


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW_S)


def until(at_s: float) -> SessionEnd:
    return SessionEnd(at_s, time.time)


def test_the_clock_keeps_two_slow_steps_three_saves_and_two_minutes_free() -> None:
    session = Session(until(NOW_S + 1000), print)
    assert (session.left_s(), session.reserve_s, session.is_over()) == (1000, 120, False)
    for _ in range(98):
        session.add_step(1.0)
    for seconds in (7.0, 9.0):
        session.add_step(seconds)
    # Of 100 steps the 99th percentile is the second slowest.
    assert (session.p99_step_s, session.median_step_s) == (7, 1)
    session.save_s = 20.0
    assert session.reserve_s == 2 * 7 + 3 * 20 + 120 == 194
    session.end = until(NOW_S + 194)
    assert not session.is_over() and session.is_over(more_s=0.1)
    session.end = until(NOW_S + 193.9)
    assert session.is_over()


def test_a_pass_of_the_loop_counts_without_compilation_and_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, now_s = Session(SessionEnd(math.inf), print), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    for seconds in (60.0, 2.0):  # the first pass compiles
        now_s[0] += seconds
        session.step_done()
    now_s[0] += 33.0
    session.add_measurement(30.0)
    session.step_done()
    assert (session.p99_step_s, session.median_step_s, session.measure_s) == (3, 2.5, 30)


def test_only_the_last_200_steps_count() -> None:
    session = Session(SessionEnd(math.inf), print)
    assert session.p99_step_s == 0 and math.isnan(session.median_step_s)
    session.add_step(60.0)  # with compilation
    for _ in range(199):
        session.add_step(1.0)
    assert session.p99_step_s == 1  # the third slowest of 200
    session.add_step(5.0)
    session.add_step(5.0)
    session.add_step(5.0)
    assert session.p99_step_s == 5 and not session.is_over(more_s=1e9)


@pytest.mark.parametrize(
    ("deadline", "end_s"),
    [
        ("2027-01-15T09:00Z", NOW_S + 3600),
        ("2027-01-15T10:00:00+01:00", NOW_S + 3600),
        ("1800003600", NOW_S + 3600),
        ("1800003600.5", NOW_S + 3600.5),
    ],
)
def test_forms_of_a_deadline(deadline: str, end_s: float) -> None:
    assert session_end(deadline, None, time.monotonic()) == (end_s, time.time)


def test_only_a_deadline_follows_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [NOW_S]
    monkeypatch.setattr(time, "time", lambda: now_s[0])
    of_length, of_day, never = (
        Session(session_end(*limits, time.monotonic()), print)
        for limits in ((None, 600.0), ("2027-01-15T08:10Z", None), (None, None))
    )
    for set_s in (0, 7200, -7200):
        now_s[0] = NOW_S + set_s
        assert 590 < of_length.left_s() <= 600 and not of_length.is_over()
        assert of_day.left_s() == 600 - set_s and of_day.is_over() == (set_s > 0)
        assert never.left_s() == math.inf


def test_a_deadline_without_a_zone_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-2")  # POSIX: two hours east
    time.tzset()
    try:
        assert session_end("2027-01-15T11:00", None, 0).at_s == NOW_S + 3600
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("deadline", "max_seconds", "complaint"),
    [
        ("tomorrow", None, r"deadline tomorrow: not a time; write it as 2027-01-\d\dT"),
        ("9", None, "deadline 9: not a time"),
        ("21:30", None, "deadline 21:30: not a time; write it as 2027"),
        ("0001-01-01", None, "deadline 0001-01-01: "),
        ("1800003600000", None, "is more than a year away; check the unit"),
        ("2027-01-15T07:00Z", None, "leaves 0 s, and 120 s are kept"),
        ("2027-01-15T08:01Z", None, "leaves 60 s"),
        (None, 169.0, "max_seconds 169.0: leaves 119 s"),
    ],
)
def test_useless_deadlines(deadline: str | None, max_seconds: float | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        session_end(deadline, max_seconds, time.monotonic() - 50)


def test_a_session_says_why_it_stops_and_else_beats() -> None:
    received, beats = [], []
    session = Session(until(NOW_S + 200), beats.append)
    session.interrupted = lambda: bool(received)
    session.go_on("step 1", more_s=80)
    assert beats == ["step 1"] and session.why_stop() is None
    with pytest.raises(StopNow, match="the session ends in 3 min 20 s"):
        session.go_on("measuring", more_s=81)
    received.append(signal.SIGTERM)
    assert session.why_stop() == "a signal came" and beats == ["step 1"]


def test_durations() -> None:
    texts = [duration(seconds) for seconds in (-1, 59.9, 60, 3599, 3600, 35940)]
    assert texts == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "9 h 59 min"]


def fake_setup(num_steps: int, step: int = 0) -> Any:
    return SimpleNamespace(step_batches=range(num_steps), state=SimpleNamespace(step=step))


NOT_TIMED: Any = None  # no step is timed


def test_the_forecast_counts_what_is_kept_free() -> None:
    session = Session(until(NOW_S + 1120), print)
    session.measure_s = 50
    # 1120 - 120 s for 95 steps of 10 s and 50 s of measuring.
    assert fit_deadline.forecast(TrainConfig(), fake_setup(100), 5, session, 10.0) is None
    line = fit_deadline.forecast(TrainConfig(), fake_setup(200), 5, session, 10.0)
    assert line is not None
    assert line.startswith("WARNING: the 195 steps left take 33 min 20 s at 10 s each, the session")
    assert "has 18 min 40 s: it will stop at about step 105 of 200, to be continued" in line
    # All steps fit, and the measurement does not.
    line = fit_deadline.forecast(TrainConfig(), fake_setup(101), 5, session, 10.0)
    assert line is not None and "it will stop at about step 101 of 101" in line
    # 95 steps that bear a fiftieth of a measurement each take as long as 105.
    line = fit_deadline.forecast(TrainConfig(eval_steps=50), fake_setup(100), 5, session, 10.0)
    assert line is not None and "it will stop at about step 95 of 100" in line


def test_the_schedule_is_cut_to_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fit_deadline, "with_num_steps", lambda setup, config, steps: fake_setup(steps)
    )
    session, config = Session(until(NOW_S + 1120), print), TrainConfig(warmup_steps=5)
    session.measure_s = 50
    # 1120 - 120 - 50 - 20 to compile - 2 slow steps of 12 = 906 s, at 10.3 s a step: 87.96.
    timed = TimedSteps(20.0, [9.0, 10.0, 12.0])
    fit = (config, fake_setup(1000), tmp_path, session, timed, NOT_TIMED)
    setup, line = fit_deadline.fit_schedule(*fit)
    assert len(setup.step_batches) == 87
    assert line == "At 10 s a step 87 of 1,000 steps fit: the schedule is shortened to them."
    assert (tmp_path / fit_deadline.SCHEDULE).read_text() == '{\n "num_steps": 87\n}'
    session.end = until(NOW_S + 120 + 50 + 20 + 24 + 61)  # 5 steps: only the warm-up
    with pytest.raises(ValueError, match="5 steps fit at 10 s a step, no more than the 5 of the"):
        fit_deadline.fit_schedule(*fit)


def test_a_run_begun_without_it_is_not_fitted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"begun without it, with 1,000 steps.*--fork-from"):
        fit_deadline.fit_schedule(
            TrainConfig(),
            fake_setup(1000, 7),
            tmp_path,
            Session(until(NOW_S + 9000), print),
            None,
            NOT_TIMED,
        )


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    files = {*os.listdir("/proc/self/fd")}
    with catch_signals() as stopped:
        assert not stopped()
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before and {*os.listdir("/proc/self/fd")} <= files


def start_busy(*command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*HEARS_SIGNALS, *command, sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_signals_are_heard_within_a_step_and_the_second_ends_it() -> None:
    with start_busy() as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        # Both before it runs again.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            process.send_signal(number)
        assert process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert process.stderr.read() == "Stopping soon; once more to stop at once.\n"


@pytest.mark.parametrize("wait_s", [0, 60], ids=["that ends it", "that goes on"])
@pytest.mark.parametrize("where", ["callback", "finalizer"])
@pytest.mark.parametrize(
    ("context", "number"), [(interruptible, signal.SIGTERM), (interrupts_kept, signal.SIGINT)]
)
def test_no_signal_is_lost_in_a_collection(
    context: Callable[[], AbstractContextManager[None]],
    number: signal.Signals,
    where: str,
    wait_s: float,
) -> None:
    sent = []

    def send(*_: object) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    class Finalized:
        __del__ = send

    hook = sys.unraisablehook
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background
    try:
        with pytest.raises(KeyboardInterrupt), context():
            if where == "callback":
                gc.callbacks.append(send)
                gc.collect()
            else:
                Finalized()
            time.sleep(wait_s)
    finally:
        gc.callbacks[:] = [each for each in gc.callbacks if each is not send]
        signal.signal(signal.SIGINT, before)
    assert sent and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert sys.unraisablehook is hook


def test_what_nohup_ignores_stays_ignored() -> None:
    with start_busy("sh", "-c", 'trap "" HUP; exec "$@"', "sh") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert (process.returncode, out) == (0, "stopped\n")
    assert err == "Stopping soon; once more to stop at once.\n"
