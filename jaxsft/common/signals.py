"""SIGINT, SIGTERM and SIGHUP: each becomes a request to stop, and none is lost."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPING = b"Stopping soon; once more to stop at once.\n"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, while nothing is there to save.

    A second signal ends the process.
    """
    with interrupts_kept(), _signals_to(signal.default_int_handler, b""):
        yield


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """No KeyboardInterrupt is lost. Python drops what is raised in a finalizer or a callback of the
    garbage collector, such as JAX's, and a tenth of set-up is collection: it is raised again a
    millisecond later. Outside the main thread nothing is done: it hears of no signals."""
    if not hears_signals():
        yield
        return
    hook = sys.unraisablehook

    def again(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 1e-3)
        else:
            hook(dropped)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = again
    try:
        yield
        if signal.getitimer(signal.ITIMER_REAL)[0]:
            raise KeyboardInterrupt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, before)


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Takes over SIGINT, SIGTERM and SIGHUP; yields whether one came. A second ends the process."""
    received: list[int] = []
    with _signals_to(lambda number, _: received.append(number), _STOPPING):
        yield lambda: bool(received)


@contextmanager
def _signals_to(handler: Callable[[int, Any], Any], line: bytes) -> Iterator[None]:
    """Signals go to `handler`, as soon as the main thread is back in Python: not within a step or a
    compilation. A thread hears of them at once: it writes `line` to stderr at the first, and ends
    the process at the second, with 128 + its number as shells do.
    """
    if not hears_signals():
        yield
        return
    # Not those that the user had ignored, as nohup does with SIGHUP.
    taken = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # the interpreter demands it
    thread = threading.Thread(target=_hear, args=(reader, line, taken), daemon=True)
    thread.start()
    handlers = {each: signal.signal(each, handler) for each in taken}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, old in handlers.items():
            signal.signal(each, old)
        os.close(writer)
        thread.join()


def hears_signals() -> bool:
    """Is this the main thread, the only one that Python lets handle signals?"""
    return threading.current_thread() is threading.main_thread()


def _hear(reader: int, line: bytes, numbers: Sequence[int]) -> None:
    """Reads the numbers of signals from the pipe that the interpreter writes them to."""
    is_second = False
    while received := os.read(reader, 1):
        if received[0] not in numbers:
            continue
        if is_second:
            os._exit(128 + received[0])
        is_second = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, line)
    os.close(reader)
