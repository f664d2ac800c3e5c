"""A console for long runs: a line that cannot be printed is dropped, and the run goes on."""

import atexit
import contextlib
import io
import os
import sys
from typing import IO, TextIO, cast

from rich.console import Console


def make_console() -> Console:
    """A console on stdout as it is now; lines are wrapped on terminals only.

    Output that fails (a full disk, a pipe whose reader has gone, a terminal that hung up) raises
    nothing, nor does it change the exit code.
    """
    atexit.unregister(_discard_unwritten)
    atexit.register(_discard_unwritten)
    stream = sys.stdout or io.StringIO()  # None where the process began without a stdout
    file = cast(IO[str], _Tolerant(stream))  # as far as rich needs one
    # No markup: file names may hold brackets.
    return Console(file=file, highlight=False, markup=False, soft_wrap=not file.isatty())


class _Tolerant(io.TextIOBase):
    """A text stream that drops what `stream` cannot take; characters it lacks become ?."""

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
        with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
            self._stream.flush()


def _discard_unwritten() -> None:
    """Empties the buffers of stdout and stderr.

    The interpreter flushes them as its last act, and exits with 120 where that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed
            continue
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
