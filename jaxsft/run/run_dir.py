"""A run's directory: held against a second trainer, with room for what the run will write."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Self

_SPARE_BYTES = 64 * 2**20  # metrics, samples, TensorBoard events


class ReplacedError(Exception):
    """Another process has taken or continued the run; the text says so."""


class RunDir:
    """Makes and holds `path` as long as it is entered; nothing is left of it when still empty.

    The lock is one of the system on the directory itself: it ends with the process, whatever ends
    it. Where the file system has no such locks (`is_locked` False), nothing is held.

    Raises, on entering, ValueError when another process holds it or it can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd = -1
        self._made: list[Path] = []
        self.is_locked = False

    def __enter__(self) -> Self:
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        try:
            self._hold()
            self._made = missing
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            self._made = missing
            self.__exit__()
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}): choose an output_dir that is a "
                "writable directory"
            ) from error
        return self

    def _hold(self) -> None:
        """Makes the directory unless it is there, and locks it."""
        self._release()
        while not self.is_there():  # else removed by its holder, between being opened and locked
            self._release()
            self.path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_locked = True
            except BlockingIOError:
                holder = self._holder()
                self._release()
                raise ValueError(
                    f"{self.path}: another process trains here{holder}; wait for it or stop it, or "
                    "choose another --name"
                ) from None
            except OSError:
                self.is_locked = False  # NFS without locks, say

    def _holder(self) -> str:
        """ " (process N)" where the system tells."""
        try:
            inode = os.fstat(self._fd).st_ino
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if "->" not in fields and fields[5].endswith(f":{inode}") and int(fields[4]) > 0:
                    return f" (process {fields[4]})"
        except (OSError, LookupError, ValueError):
            pass
        return ""

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, *_: object) -> None:
        for each in self._made:
            try:
                each.rmdir()
            except OSError:
                break  # something is in it
        self._release()  # last: what is removed is nobody else's

    def is_there(self) -> bool:
        """Is the directory that was made or found still at its path?"""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def make_again(self) -> None:
        """After it has vanished. Raises OSError where that can't be done, ReplacedError where
        another process was faster."""
        try:
            self._hold()
        except ValueError as error:
            raise ReplacedError(str(error)) from error


def check_free_space(run_dir: Path, checkpoint_bytes: int, num_checkpoints: int) -> None:
    """ValueError unless `run_dir` has room for so many checkpoints more, one half-written, and for
    the adapter."""
    needed = checkpoint_bytes * (num_checkpoints + 1) + checkpoint_bytes // 3 + _SPARE_BYTES
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        mib = 2**20
        raise ValueError(
            f"{run_dir}: {free / mib:,.0f} MiB free, but {needed / mib:,.0f} MiB are needed for "
            f"{num_checkpoints} checkpoints of {checkpoint_bytes / mib:,.0f} MiB, one that is "
            "being written and the adapter; free some space, choose another output_dir or lower "
            "save_total_limit"
        )
