"""When a run has to stop before its end: a signal came, or the session's time runs out.

A deadline is a time of day, and follows the system's clock. `max_seconds` is a length of time, on a
clock that nobody sets. `Session.reserve_s` keeps time free before the end for two slow steps, three
saves and 120 s for everything that is not measured.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from jaxsft.common.hosts import any_of
from jaxsft.common.signals import catch_signals

RESERVE_S = 120.0
_LONGEST_S = 366 * 86400.0
_WINDOW = 200  # steps that the 99th percentile is taken of


class StopNow(Exception):
    """The run has to stop before its end; the text says why."""


class SessionEnd(NamedTuple):
    """When a session ends: at `at_s`, in seconds of `clock`; infinite for never."""

    at_s: float
    clock: Callable[[], float] = time.monotonic

    def left_s(self) -> float:
        """Seconds until then."""
        return self.at_s - self.clock()


class Session:
    """The time that a run has, what its steps and saves take of it, and whether to stop.

    Args:
      end: when the session ends.
      beat: tells the watchdog what is being done.

    Attributes:
      save_s: seconds of the last save, from its start until it was on disk.
      measure_s: seconds of the longest measurement of held-out rows.
      steps_per_pass: steps of a pass of the loop, between two moments at which it may stop.
      interrupted: returns whether a signal came; signals count inside `catching_signals`.
    """

    def __init__(self, end: SessionEnd, beat: Callable[[str], None]):
        self.end, self.beat = end, beat
        self.save_s = self.measure_s = 0.0
        self.steps_per_pass = 1
        self.interrupted: Callable[[], bool] = lambda: False
        self._step_s: deque[float] = deque(maxlen=_WINDOW)
        self._pass_began_s: float | None = None

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Inside, the first SIGINT, SIGTERM or SIGHUP asks the run to stop and save."""
        with catch_signals() as self.interrupted:
            yield

    def left_s(self) -> float:
        """Seconds until the session ends."""
        return self.end.left_s()

    def step_done(self) -> None:
        """Call it after every pass of the loop. The first call only starts the clock, so that the
        pass that compiles does not count."""
        now_s = time.monotonic()
        if self._pass_began_s is not None:
            self.add_step(now_s - self._pass_began_s)
        self._pass_began_s = now_s

    def add_step(self, seconds: float) -> None:
        """Counts a pass of the loop that took so long."""
        self._step_s.append(seconds)

    def add_measurement(self, seconds: float) -> None:
        """Counts a measurement of held-out rows; the pass of the loop it happened in is shorter by
        as much."""
        self.measure_s = max(self.measure_s, seconds)
        if self._pass_began_s is not None:
            self._pass_began_s += seconds

    @property
    def median_step_s(self) -> float:
        """Median of the last 200 passes of the loop, by their steps; NaN before the first."""
        return statistics.median(self._step_s or [math.nan]) / self.steps_per_pass

    @property
    def p99_step_s(self) -> float:
        """99th percentile of the last 200 passes of the loop; 0 before the first."""
        ordered = sorted(self._step_s)
        return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 0.0

    @property
    def reserve_s(self) -> float:
        """Seconds kept free for the steps under way, for saving, and for the unforeseen."""
        return 2 * self.p99_step_s + 3 * self.save_s + RESERVE_S

    def is_over(self, more_s: float = 0.0) -> bool:
        """Is it time to stop, or would it be after `more_s` more seconds?"""
        return self.left_s() - more_s < self.reserve_s

    def why_stop(self, more_s: float = 0.0) -> str | None:
        """Why to stop now, or why `more_s` more seconds are too many; None to go on.

        With several processes all must ask: all stop where one has to.
        """
        why = None
        if self.interrupted():
            why = "a signal came"
        elif self.is_over(more_s):
            why = f"the session ends in {duration(self.left_s())}"
        return why or "another process has to stop" if any_of(why is not None) else None

    def go_on(self, doing: str, more_s: float = 0.0) -> None:
        """Raises StopNow where `why_stop` gives a reason; otherwise beats with what comes next."""
        why = self.why_stop(more_s)
        if why is not None:
            raise StopNow(why)
        self.beat(doing)


def session_end(deadline: str | None, max_seconds: float | None, began_s: float) -> SessionEnd:
    """When the session ends; never without a limit.

    Args:
      deadline: ISO 8601, in local time unless it says otherwise, or seconds since 1970.
      max_seconds: counted from `began_s`, which is of time.monotonic.

    Raises ValueError for a text that is not a time, and for an end too near to train at all.
    """
    if deadline is None and max_seconds is None:
        return SessionEnd(math.inf)
    option, end = f"max_seconds {max_seconds}", SessionEnd(began_s + (max_seconds or 0))
    if deadline is not None:
        option = f"deadline {deadline}"
        try:
            is_number = deadline.replace(".", "", 1).isdigit() and len(deadline) > 8
            at_s = float(deadline) if is_number else datetime.fromisoformat(deadline).timestamp()
        except (ValueError, OverflowError):
            example = datetime.fromtimestamp(time.time()).astimezone() + timedelta(hours=9)
            raise ValueError(
                f"{option[:100]}: not a time; write it as {example.isoformat(timespec='minutes')} "
                "or as seconds since 1970"
            ) from None
        end = SessionEnd(at_s, time.time)
    left_s = end.left_s()
    if left_s > _LONGEST_S:
        raise ValueError(f"{option}: is more than a year away; check the unit and the year")
    if left_s < RESERVE_S:
        raise ValueError(
            f"{option}: leaves {max(left_s, 0):.0f} s, and {RESERVE_S:.0f} s are kept for stopping "
            "and saving; give the session more time"
        )
    return end


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for people: "3 h 05 min", "4 min 10 s", "12 s"."""
    whole = int(max(seconds, 0))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
