"""An append-only file for disks that may fail for a while: no call raises, no record is torn."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

# Bounds what a file keeps in memory: once what is written, once what waits. A run of 10,000 steps
# writes 5 MB of lines and 3 MB of events.
MAX_KEPT_BYTES = 64 * 2**20


class AppendFile:
    """Appends records (lines, say) to a file, each whole, once and in order.

    Where that fails (a full or read-only disk, a lost mount) they wait in memory, and every
    `append` and `flush` tries again. A record that a full disk cut short is removed, so that no
    later one follows its half on the same line. A file that has vanished, its directory perhaps
    with it, is written anew from the records in memory. It is opened for each write: no handle
    outlives what it points at, and there is nothing to close.

    Of what is written the newest `MAX_KEPT_BYTES` are kept; once so much waits, new records are
    dropped, and `problem` counts them.

    Args:
        path: the file; this process alone writes to it.
        there: what it is to hold already, in whole records. If it doesn't begin with them it is
            rewritten; what follows them is cut off. Without any, the file goes.
    """

    def __init__(self, path: Path, there: Iterable[bytes] = ()) -> None:
        self._path = path
        # No name that TensorBoard would take for one of its files.
        self._temporary = path.with_name(f"{path.name.partition('.')[0]}.tmp")
        self._written: deque[bytes] = deque()
        self._waiting = deque(there)
        self._file_bytes: int | None = None  # that are right; None: the file is to be written anew
        self._kept_bytes = 0  # of _written
        self._num_lost = 0
        self._error: OSError | None = None
        with contextlib.suppress(OSError):
            self._temporary.unlink()  # of a process killed in the middle
        self._adopt(b"".join(self._waiting))
        self.flush()

    def append(self, record: bytes) -> None:
        """Writes `record` behind those that wait, or lets it wait with them."""
        self._waiting.append(record)
        self.flush()
        if sum(map(len, self._waiting)) > MAX_KEPT_BYTES:
            self._waiting.pop()
            self._num_lost += 1

    def flush(self) -> None:
        """Writes what waits, if that works now."""
        try:
            if not self._written and not self._waiting:
                if self._path.exists():
                    self._path.unlink()
            elif self._is_there():
                self._append()
            else:
                self._rewrite()
            self._error = None
        except OSError as error:
            self._error = error
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._written) > 1:
            self._kept_bytes -= len(self._written.popleft())

    @property
    def problem(self) -> str | None:
        """What is wrong with the file, in one line; None when all of it is written."""
        if self._error is not None:
            count = len(self._waiting) + self._num_lost
            return f"{self._path}: {self._error.strerror} (lines not written: {count})"
        if self._num_lost:
            mib = MAX_KEPT_BYTES // 2**20
            return f"{self._path}: {self._num_lost} lines lost, more than {mib} MiB had to wait"
        return None

    def _adopt(self, records: bytes) -> None:
        """Takes the file as it is, if it begins with the `records` that wait."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            if file.read(len(records)) == records:
                self._file_bytes = len(records)
                self._count_written(len(self._waiting))

    def _is_there(self) -> bool:
        """Is the file on disk the one that was written, if only with a torn record at its end?"""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return False
        return self._file_bytes is not None and size >= self._file_bytes

    def _append(self) -> None:
        size, count = self._file_bytes, 0
        assert size is not None
        if not self._waiting and self._path.stat().st_size == size:
            return  # a disk that has become read-only is no problem then
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.fstat(file).st_size > size:
                os.ftruncate(file, size)
            for record in self._waiting:
                _write_all(file, record)
                size, count = size + len(record), count + 1
        except OSError:
            with contextlib.suppress(OSError):  # else the next call does it
                os.ftruncate(file, size)
            raise
        finally:
            os.close(file)  # raises where a network file system is full: then nothing counts
            self._file_bytes = size
            self._count_written(count)

    def _rewrite(self) -> None:
        """Writes all records, atomically: a killed process leaves the old file or the new one."""
        self._waiting.extendleft(reversed(self._written))
        self._written.clear()
        self._file_bytes, self._kept_bytes = None, 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                for record in self._waiting:
                    _write_all(file, record)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(self._temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            raise
        self._file_bytes = sum(map(len, self._waiting))
        self._count_written(len(self._waiting))

    def _count_written(self, count: int) -> None:
        for _ in range(count):
            record = self._waiting.popleft()
            self._written.append(record)
            self._kept_bytes += len(record)


def _write_all(file: int, record: bytes) -> None:
    """A full disk takes a part at first, and raises only at the next write."""
    left = memoryview(record)
    while left:
        left = left[os.write(file, left) :]
