"""When a run has to stop before its end: a signal came, or the session runs out of time.

A session's end is an absolute time. What a stop takes is kept free before it, by the rule of
`Clock.is_up`: two slow steps, three saves and 120 s for all that is not measured.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta

from jaxsft.common.hosts import any_of

RESERVE_S = 120.0
_LONGEST_S = 366 * 86400.0
_WINDOW = 200  # steps that the 99th percentile is taken of


class Clock:
    """The time that is left, and what the run's steps and saves take of it.

    Args:
      end_s: when the session ends, in seconds since 1970; infinite for never.
    """

    def __init__(self, end_s: float):
        self.end_s = end_s
        self.save_s = 0.0  # the last save, from its start until it was on disk
        self.measure_s = 0.0  # the longest measurement of held-out rows
        self._step_s: deque[float] = deque(maxlen=_WINDOW)

    def left_s(self) -> float:
        """Seconds until the session ends."""
        return self.end_s - time.time()

    def add_step(self, seconds: float) -> None:
        """Counts a step of the loop, with all that happened since the one before but measuring."""
        self._step_s.append(seconds)

    @property
    def median_step_s(self) -> float:
        """Of the last steps; NaN before the first."""
        return statistics.median(self._step_s) if self._step_s else math.nan

    @property
    def p99_step_s(self) -> float:
        """99th percentile of the last steps; 0 before the first."""
        ordered = sorted(self._step_s)
        return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 0.0

    @property
    def reserve_s(self) -> float:
        """What is kept free for the steps under way, for saving, and for the unforeseen."""
        return 2 * self.p99_step_s + 3 * self.save_s + RESERVE_S

    def is_up(self, more_s: float = 0.0) -> bool:
        """Is it time to stop, or would it be after `more_s` seconds?"""
        return self.left_s() - more_s < self.reserve_s


def session_end_s(deadline: str | None, max_seconds: float | None, started_s: float) -> float:
    """When the session ends, in seconds since 1970; infinite without a limit.

    Args:
      deadline: ISO 8601, in local time unless it says otherwise, or seconds since 1970.
      max_seconds: counted from `started_s`.

    Raises ValueError for what is no time, and for one that leaves nothing to train in.
    """
    if deadline is None and max_seconds is None:
        return math.inf
    option, end_s = f"max_seconds {max_seconds}", started_s + (max_seconds or 0)
    if deadline is not None:
        option = f"deadline {deadline}"
        try:
            is_number = deadline.replace(".", "", 1).isdigit() and len(deadline) > 8
            end_s = float(deadline) if is_number else datetime.fromisoformat(deadline).timestamp()
        except ValueError:
            example = datetime.fromtimestamp(started_s).astimezone() + timedelta(hours=9)
            raise ValueError(
                f"{option}: not a time; write it as {example.isoformat(timespec='minutes')} or as "
                "seconds since 1970"
            ) from None
    left_s = end_s - time.time()
    if left_s > _LONGEST_S:
        raise ValueError(f"{option}: is more than a year away; check the unit and the year")
    if left_s < RESERVE_S:
        raise ValueError(
            f"{option}: leaves {max(left_s, 0):.0f} s, and {RESERVE_S:.0f} s are kept for stopping "
            "and saving; give the session more time"
        )
    return end_s


class StopNow(Exception):
    """The run has to stop before its end; the text says why."""


class Session:
    """What may end a run early, and the watchdog that must hear of its progress.

    Args:
      interrupted: has a signal come?
      beat: tells the watchdog what is being done.
    """

    def __init__(self, clock: Clock, interrupted: Callable[[], bool], beat: Callable[[str], None]):
        self.clock, self.interrupted, self.beat = clock, interrupted, beat

    def why_stop(self, more_s: float = 0.0) -> str | None:
        """Why to stop now, or that `more_s` seconds more are too many; None to go on.

        Of several processes all stop where one has to: all must ask.
        """
        why = None
        if self.interrupted():
            why = "a signal came"
        elif self.clock.is_up(more_s):
            why = f"the session ends in {duration(self.clock.left_s())}"
        return why or "another process has to stop" if any_of(why is not None) else None

    def go_on(self, doing: str, more_s: float = 0.0) -> None:
        """Raises StopNow where `why_stop` says so; otherwise the watchdog hears what follows."""
        why = self.why_stop(more_s)
        if why is not None:
            raise StopNow(why)
        self.beat(doing)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for people: "3 h 05 min", "4 min 10 s", "12 s"."""
    whole = int(max(seconds, 0))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
