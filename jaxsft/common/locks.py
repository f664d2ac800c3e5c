"""Locks on directories; scratch files and directories that are removed if their process has ended.

The lock is the operating system's own (flock), on the directory itself: it ends with the process,
whatever ends it, and leaves no file behind. Some file systems (Lustre, some NFS, some of FUSE) have
no such locks. There every command works as well, but nothing keeps a second process out, which is
said once, on stderr.

What a killed process leaves is removed by the next command that works in the directory. The name of
a scratch file or directory says whose it is: the machine since it was started, the container, the
process and when that began. It is a leftover where

    this machine and container have no such process any more; or
    it is another's, and its directory can be locked or was not changed for a day.

Between machines that share a file system, only the day counts: NFS locks a directory within one
machine, and some mounts lock files so too.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from filelock import lock_descriptor

from jaxsft.common.text import visible_line

_PARTIAL, _TMP = ".partial-", ".tmp"
_OWNED = re.compile(r"([0-9a-f]{8})-([0-9]+)-([0-9]+)-([0-9]+)-[0-9a-f]{8}")
_SHARED = re.compile(
    "nfs.*|fuse[.].*|fuse|lustre|cifs|smb.*|beegfs|gpfs|ceph|9p|virtiofs|afs|ocfs2|gfs2|wekafs|panfs"
)
_OLD_S = 86400.0
_said: set[int] = set()  # file systems without locks


class LockedError(ValueError):
    """Another process holds the directory; `holder` is " (process N)" where the system tells."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path}: another process works in it{holder}; wait for it or stop it")
        self.holder = holder


class DirectoryLock:
    """Holds `path` while it is entered; directories that it made and that stayed empty are removed.

    Attributes:
      is_locked: False also while the directory is held where the file system has no locks; then
        stderr got a line.

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
        except OSError as error:
            _say_no_locks(self.path, error)
            return
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


def _say_no_locks(path: Path, error: OSError) -> None:
    """On stderr, once for each file system."""
    place = path.parent if _PARTIAL in path.name else path
    device = place.stat().st_dev
    if device in _said:
        return
    _said.add(device)
    why = os.strerror(error.errno) if error.errno else "flock fails"
    line = (
        f"{place}: its file system has no locks ({why}), so nothing keeps a second process out; "
        "let one at a time work there"
    )
    with contextlib.suppress(OSError):
        os.write(2, f"{visible_line(line)}\n".encode(errors="replace"))


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


def has_locks(directory: Path) -> bool:
    """Can files in the directory be locked? Where they cannot, stderr gets a line, once."""
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            _say_no_locks(directory, error)
            return False
    return True


def scratch_name() -> str:
    """A new name that says which process it belongs to."""
    try:
        _, began = _stat(os.getpid())
    except OSError:  # other systems than Linux
        began = 0
    return "-".join(map(str, (*_machine(), os.getpid(), began, secrets.token_hex(4))))


@contextlib.contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, locked, and removed at the end unless it was renamed.

    What becomes `output` is written there and renamed when it is complete. OSError where nothing
    can be written.
    """
    lock = DirectoryLock(output.absolute().with_name(f".{output.name}{_PARTIAL}{scratch_name()}"))
    try:
        lock.hold(wait=True)
        yield lock.path
    finally:
        shutil.rmtree(lock.path, ignore_errors=True)
        lock.release()  # last: nobody else may hold what is removed


def scratch_file(path: Path) -> Path:
    """A new name beside `path` for the file that is renamed to `path` when it is whole."""
    return path.with_name(f"{path.name}.{scratch_name()}{_TMP}")


def remove_leftovers(
    directory: Path,
    name: str | None = None,
    rescue: Callable[[Path], None] = lambda scratch: None,
    *,
    is_held: bool = False,
) -> list[Path]:
    """Removes the scratch files and directories in `directory` whose processes have ended.

    Args:
      name: only those beside the output of this name.
      rescue: called with each directory before it is removed.
      is_held: this process holds the directory, so no other machine writes files there.

    Returns:
      What was removed. What a process is at work on, or cannot be removed, stays.
    """
    beside, removed = "*" if name is None else glob.escape(name), []
    for scratch in directory.glob(f".{beside}{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _is_leftover(handle, scratch, scratch.name.rpartition(_PARTIAL)[2]):
                    rescue(scratch)
                    shutil.rmtree(scratch)
                    removed.append(scratch)
            finally:
                os.close(handle)
    for file in directory.glob(f"{beside}.*{_TMP}"):
        owner = file.name.removesuffix(_TMP).rpartition(".")[2]
        with contextlib.suppress(OSError):
            if _OWNED.fullmatch(owner) and _is_leftover(None, file, owner, is_held):
                file.unlink()
                removed.append(file)
    return removed


def remove_old(file: Path, lock: Path) -> None:
    """Removes another program's temporary file unless its lock file is locked.

    Without locks, or without a lock file, it must be a day old.
    """
    with contextlib.suppress(OSError):
        try:
            with lock.open("r+b") as handle:
                is_free = lock_descriptor(handle.fileno(), blocking=False)
        except OSError:
            is_free = _is_old(file)
        if is_free:
            file.unlink()


def _is_leftover(handle: int | None, scratch: Path, owner: str, is_held: bool = False) -> bool:
    """`handle` is of a directory, which its process holds where there are locks."""
    found = _OWNED.fullmatch(owner)
    machine, container = _machine()
    if found and (found[1], int(found[2])) == (machine, container):
        return not _is_alive(int(found[3]), int(found[4]))
    is_free = is_held
    if handle is not None:
        try:
            is_free = lock_descriptor(handle, blocking=False)
        except OSError:
            is_free = False
        else:
            if not is_free:
                return False
    is_here = (found and found[1] == machine) or not _is_shared(scratch.parent)
    return (is_free and is_here) or _is_old(scratch)


def _is_shared(directory: Path) -> bool:
    """Can other machines write there as well? False where the system does not tell."""
    device = directory.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        # https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, about = line.partition(" - ")
            if mount.split()[2] == name:
                return _SHARED.fullmatch(about.split()[0]) is not None
    return False


def _is_old(path: Path) -> bool:
    """Was nothing in it, or the file itself, changed for a day?"""
    changed_s = [each.lstat().st_mtime for each in (path, *path.rglob("*"))]
    return time.time() - max(changed_s) > _OLD_S


@functools.cache
def _machine() -> tuple[str, int]:
    """Names this machine since it was started, and the container, in which process ids count."""
    said, container = platform.node(), 0
    with contextlib.suppress(OSError):  # other systems than Linux
        said = Path("/proc/sys/kernel/random/boot_id").read_text()
        container = os.stat("/proc/self/ns/pid").st_ino
    return hashlib.sha256(said.encode()).hexdigest()[:8], container


def _is_alive(pid: int, began: int) -> bool:
    try:
        state, its_began = _stat(pid)
    except OSError:  # it has ended, or is hidden, or this is another system than Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return True
    return state not in "ZX" and its_began == began


def _stat(pid: int) -> tuple[str, int]:
    """(state, when it began in clock ticks since the machine's start) of a process.

    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html. Raises OSError.
    """
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    fields = text.rpartition(")")[2].split()  # the name, in parentheses, may hold blanks
    return fields[0], int(fields[19])
