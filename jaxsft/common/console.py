"""A console for long runs: if a line cannot be printed, it is dropped and the run continues."""

import atexit
import contextlib
import io
import os
import sys
from typing import IO, TextIO, cast

from rich.console import Console


def make_console() -> Console:
    """A console on the current stdout. It wraps lines only on a terminal.

    If output fails (disk full, reader of a pipe gone, terminal closed), no error is raised and the
    exit code does not change.
    """
    atexit.unregister(_discard_unwritten)
    atexit.register(_discard_unwritten)
    stream = sys.stdout or io.StringIO()  # None if the process was started without stdout
    file = cast(IO[str], _Tolerant(stream))  # it has what rich uses
    # No markup: file names may contain brackets.
    return Console(file=file, highlight=False, markup=False, soft_wrap=not file.isatty())


class _Tolerant(io.TextIOBase):
    """A text stream that ignores failed writes; characters not in its encoding become "?"."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.flush()


def _discard_unwritten() -> None:
    """Empties the buffers of stdout and stderr.

    Python flushes them at exit, and if that fails the exit code is 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed
            continue
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
