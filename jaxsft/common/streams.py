"""stdout and stderr of a command: no text steers the terminal, and no terminal ends the work."""

import atexit
import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from jaxsft.common.text import harmless

# Our own marks, for terminals that have no such characters.
_PLAIN = str.maketrans(
    {"…": "...", "–": "-", "−": "-", "×": "x", "·": ".", "⟨": "<", "⟩": ">", "⟦": "[", "⟧": "]"}
    | dict.fromkeys("─━▁", "-")
    | {"‖": "||", "✓": "ok", "✗": "x", "↵": "\\n", "⇥": "\\t", "⁽": "(", "⁾": ")", "→": "->"}
)
_BAR_UP = re.compile(r"(?:\x1b\[A)+")  # tqdm's only escape sequence, always a write of its own


class _SafeStream(io.TextIOBase):
    """A text stream of people: whatever is written, no character in it steers their terminal.

    Characters that its encoding lacks become plainer ones, or backslash escapes. A write that
    fails (disk full, reader of a pipe gone, terminal closed) is dropped, so that the work goes on.

    Args:
      stream: where the text goes.
      styled: the writer (rich) has made foreign text harmless; its own escape sequences stay.
      strict: a write that fails raises OSError.
    """

    def __init__(self, stream: TextIO, *, styled: bool = False, strict: bool = False) -> None:
        self.stream, self._styled, self._strict = stream, styled, strict

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return not self.closed and self.stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not (self._styled or _BAR_UP.fullmatch(text)):
            bar = "\r" * text.startswith("\r")  # progress bars return to the line's start
            text = bar + harmless(text[len(bar) :])
        encoding = self.encoding
        if not encoding.lower().startswith("utf"):
            text = text.translate(_PLAIN)
        with self._tolerated():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._tolerated():
            self.stream.flush()

    def _tolerated(self) -> contextlib.AbstractContextManager[Any]:
        # ValueError: the stream is closed.
        quiet = () if self._strict else (OSError, ValueError)
        return contextlib.suppress(*quiet)


def styled_stream(stream: TextIO | None, strict: bool = False) -> _SafeStream:
    """The same for a writer that makes foreign text harmless itself and has styles of its own."""
    return _SafeStream(_unwrapped(stream), styled=True, strict=strict)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr are safe, see `_SafeStream`, also where there were none."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_safe, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def make_process_safe() -> None:
    """`safe_streams` for the rest of this process, its traceback included.

    Closed standard streams are opened on /dev/null, so that no file of ours gets their numbers,
    and a failing disk at the exit does not change the exit code. Where the locale has ASCII names
    of files only, the process begins anew in Python's UTF-8 mode; its output stays ASCII.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"  # for those that it starts
        os.environ.setdefault("PYTHONIOENCODING", "ascii:surrogateescape")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    sys.stdout, sys.stderr = map(_safe, (sys.stdout, sys.stderr))
    atexit.register(discard_unwritten)


def _safe(stream: TextIO | None) -> TextIO:
    # None: the process was started without, python … >&-
    is_safe = isinstance(stream, _SafeStream)
    return cast(TextIO, stream if is_safe else _SafeStream(stream or io.StringIO()))


def discard_unwritten() -> None:
    """Empties the buffers of stdout and stderr.

    Python flushes them at exit, and if that fails the exit code is 120.
    """
    for stream in map(_unwrapped, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except ValueError:  # closed
            continue
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unwrapped(stream: Any) -> TextIO:
    if isinstance(stream, _SafeStream):
        return stream.stream
    return io.StringIO() if stream is None else stream
