"""Locks on directories, and scratch directories that are removed if their process has ended.

The lock is the operating system's own (flock), on the directory itself: it ends with the process,
whatever ends it, and leaves no file behind. Some file systems (Lustre, some NFS) have no such
locks; there nothing is held, and nothing of another process is removed.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from filelock import lock_descriptor

_PARTIAL = ".partial-"


class LockedError(ValueError):
    """Another process holds the directory; `holder` is " (process N)" where the system tells."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path}: another process works in it{holder}; wait for it or stop it")
        self.holder = holder


class DirectoryLock:
    """Holds `path` while it is entered; directories that it made and that stayed empty are removed.

    Attributes:
      is_locked: False also while the directory is held where the file system has no locks.

    Raises, on entering: as `hold`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.is_locked = False
        self._handle = -1
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        try:
            self.hold()
            self._made = missing
        except OSError:
            self._made = missing
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._made:
            try:
                each.rmdir()
            except OSError:
                break  # something is in it
        self.release()  # last: nobody else may hold what is removed

    def hold(self, *, wait: bool = False) -> None:
        """Makes the directory unless it exists, and locks it.

        Raises:
          LockedError: another process holds it; with `wait`, never: it waits for that one's end.
          OSError: it cannot be made or written.
        """
        self.release()
        while not self.is_there():  # its last holder may remove it before it is locked here
            self.release()
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                self._lock(wait)
        if not os.access(self.path, os.W_OK | os.X_OK):
            self.release()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))

    def _lock(self, wait: bool) -> None:
        try:
            self.is_locked = lock_descriptor(self._handle, blocking=wait)
        except OSError:
            return  # the file system has no locks
        if not self.is_locked:
            holder = _holder(self._handle)
            self.release()
            raise LockedError(self.path, holder)

    def is_there(self) -> bool:
        """Is the directory that is held still the one at `path`?"""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            return False

    def release(self) -> None:
        """Lets others hold the directory."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self.is_locked = -1, False


def _holder(handle: int) -> str:
    """ " (process N)", from Linux's list of locks; "" where that does not tell."""
    try:
        inode = os.fstat(handle).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "->" not in fields and fields[5].endswith(f":{inode}") and int(fields[4]) > 0:
                return f" (process {fields[4]})"
    except (OSError, LookupError, ValueError):
        pass
    return ""


@contextlib.contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, locked, and removed at the end unless it was renamed.

    What becomes `output` is written there and renamed when it is complete. OSError where nothing
    can be written.
    """
    scratch = f".{output.name}{_PARTIAL}{secrets.token_hex(4)}"
    lock = DirectoryLock(output.absolute().with_name(scratch))
    try:
        lock.hold(wait=True)
        yield lock.path
    finally:
        shutil.rmtree(lock.path, ignore_errors=True)
        lock.release()  # last: nobody else may hold what is removed


def remove_leftovers(
    directory: Path,
    name: str | None = None,
    rescue: Callable[[Path], None] = lambda scratch: None,
) -> list[Path]:
    """Removes the scratch directories in `directory` whose processes have ended.

    Args:
      name: only those beside the output of this name.
      rescue: called with each before it is removed.

    Returns:
      What was removed. A scratch directory whose process is at work, or that cannot be locked or
      removed, stays.
    """
    removed = []
    for scratch in directory.glob(f".{'*' if name is None else glob.escape(name)}{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock_descriptor(handle, blocking=False):
                    rescue(scratch)
                    shutil.rmtree(scratch)
                    removed.append(scratch)
            finally:
                os.close(handle)
    return removed
