"""An append-only file that survives a failing disk: no call raises, no record is cut in two."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

# Limits the records in memory: the written ones, and again the waiting ones. A run of 10,000 steps
# writes 5 MB of lines and 3 MB of events.
MAX_KEPT_BYTES = 64 * 2**20


class AppendFile:
    """Appends records, such as lines, to a file: each of them whole, once and in order.

    If the disk fails (full, read-only, mount lost), records wait in memory, and every `append` and
    `flush` tries again. If a full disk cuts a record short, its part is removed from the file, so
    no later record follows it on the same line. If the file has vanished, even with its directory,
    it is written again from memory. It is opened for each write, so there is nothing to close.

    The newest `MAX_KEPT_BYTES` of the written records stay in memory. When that many bytes wait,
    new records are dropped, and `problem` counts them.

    Args:
        path: the file; no other process writes to it.
        there: records that the file must begin with. If it does not, it is rewritten; what follows
            them is cut off. If there are none, the file is removed.
        num_bytes: in place of `there`: so many bytes of the file stay as they are, unread.
    """

    def __init__(self, path: Path, there: Iterable[bytes] = (), num_bytes: int = 0) -> None:
        self._path = path
        # TensorBoard must not take it for one of its files.
        self._temporary = path.with_name(f"{path.name.partition('.')[0]}.tmp")
        self._written: deque[bytes] = deque()
        self._waiting = deque(there)
        self._file_bytes: int | None = None  # written so far; None: the file must be written again
        self._kept_bytes = 0  # of _written
        self._num_lost = 0
        self._error: OSError | None = None
        with contextlib.suppress(OSError):
            self._temporary.unlink()  # left by a process that was killed
        if num_bytes:
            self._file_bytes = num_bytes
        else:
            self._adopt(b"".join(self._waiting))
        self.flush()

    def append(self, record: bytes) -> None:
        """Writes the waiting records and `record`; if that fails, `record` waits with them."""
        self._waiting.append(record)
        self.flush()
        if sum(map(len, self._waiting)) > MAX_KEPT_BYTES:
            self._waiting.pop()
            self._num_lost += 1

    def flush(self) -> None:
        """Tries to write the records that wait."""
        try:
            if not self._written and not self._waiting and not self._file_bytes:
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
        """One line on what is wrong with the file; None when everything is written."""
        if self._error is not None:
            count = len(self._waiting) + self._num_lost
            return f"{self._path}: {self._error.strerror} (lines not written: {count})"
        if self._num_lost:
            mib = MAX_KEPT_BYTES // 2**20
            return f"{self._path}: {self._num_lost} lines lost, more than {mib} MiB had to wait"
        return None

    def _adopt(self, records: bytes) -> None:
        """Keeps the file as it is if it begins with `records`, the ones that wait."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            if file.read(len(records)) == records:
                self._file_bytes = len(records)
                self._count_written(len(self._waiting))

    def _is_there(self) -> bool:
        """Whether the file still holds what was written; part of a record may follow."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return False
        return self._file_bytes is not None and size >= self._file_bytes

    def _append(self) -> None:
        size, count = self._file_bytes, 0
        assert size is not None
        if not self._waiting and self._path.stat().st_size == size:
            return  # nothing to do, so a read-only disk is no problem
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.fstat(file).st_size > size:
                os.ftruncate(file, size)
            for record in self._waiting:
                _write_all(file, record)
                size, count = size + len(record), count + 1
        except OSError:
            with contextlib.suppress(OSError):  # if it fails, the next call does it
                os.ftruncate(file, size)
            raise
        finally:
            os.close(file)  # may raise on a full network file system: then nothing counts
            self._file_bytes = size
            self._count_written(count)

    def _rewrite(self) -> None:
        """Writes all records to a new file and renames it, so a kill leaves the old or the new."""
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
    """Writes all bytes. A full disk takes only a part, and raises at the next write."""
    left = memoryview(record)
    while left:
        left = left[os.write(file, left) :]
