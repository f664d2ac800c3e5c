"""Ends a process that hangs: says where, prints every thread's stack, and exits."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from typing import Self

# For the last words, should what they need hang as well.
_GRACE_S = 3.0


class Watchdog:
    """A context in which `beat` must be called every `limit_s` seconds, or the process ends.

    A thread ends it by os._exit(1), with one line and all stacks on stderr. Where that thread
    cannot run, because a hanging C call holds the interpreter lock, faulthandler prints the stacks
    and exits a few seconds later. Time in which the process is stopped (SIGSTOP) counts too. Only
    one can be active in a process: faulthandler has one timer.

    Args:
        limit_s: None turns it off.
        advice: returns what the user can do, in a few words without a full stop.
    """

    def __init__(self, limit_s: float | None, advice: Callable[[], str]) -> None:
        assert limit_s is None or limit_s > 0
        self._limit_s = limit_s
        self._advice = advice
        self._last_beat = (time.monotonic(), "")
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.beat("the start")
        if self._limit_s is not None:
            watch, limit_s = self._watch, self._limit_s
            self._arm(limit_s)  # a hang may come before the thread has its first turn
            self._thread = threading.Thread(target=watch, args=(limit_s,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Restarts the time. `doing`, such as "step 12", is what the line about a hang names.

        Costs 0.3 µs.
        """
        self._last_beat = (time.monotonic(), doing)

    def _watch(self, limit_s: float) -> None:
        while True:
            self._arm(limit_s)  # not in `beat`: it starts a thread, 0.1 ms
            beaten_s, doing = self._last_beat
            left_s = beaten_s + limit_s - time.monotonic()
            if left_s <= 0:
                self._end(limit_s, doing)
            if self._is_over.wait(min(left_s, limit_s / 10)):
                return

    @staticmethod
    def _arm(limit_s: float) -> None:
        faulthandler.dump_traceback_later(limit_s + _GRACE_S, exit=True, file=2)

    def _end(self, limit_s: float, doing: str) -> None:
        limit = f"{limit_s / 60:.0f} minutes" if limit_s >= 120 else f"{limit_s:g} seconds"
        # stderr may take nothing (a reader that hangs), or the line and not the stacks.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(2 * _GRACE_S, exit=True, file=nowhere)
        words = threading.Thread(target=self._explain, args=(limit, doing), daemon=True)
        words.start()
        words.join(_GRACE_S)
        if not words.is_alive():
            faulthandler.dump_traceback(file=2)
        os._exit(1)

    def _explain(self, limit: str, doing: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"error: stuck for {limit} in {doing}; ".encode())
            os.write(2, f"{self._advice()}; stacks of all threads follow\n".encode())
