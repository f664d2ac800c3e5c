"""A disk so small that a test can fill it: a tmpfs, mounted for as long as the test needs it."""

import contextlib
import errno
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(size_bytes: int) -> Iterator[Path]:
    """Mounts a tmpfs of `size_bytes`, rounded up to pages of 4 KiB; yields its directory.

    Skips the test where this process may not mount.
    """
    with tempfile.TemporaryDirectory(prefix="small-disk-") as directory:
        options = f"size={size_bytes},mode=700"
        mount = ["mount", "-t", "tmpfs", "-o", options, "jaxsft-test", directory]
        try:
            done = subprocess.run(mount, capture_output=True, text=True)
            problem = done.stderr.partition("\n")[0] if done.returncode else ""
        except OSError as error:
            problem = str(error)
        if problem:
            pytest.skip(
                f"needs to mount a tmpfs ({problem}): run as root, or on Linux under "
                "`unshare --user --map-root-user --mount python -m pytest`"
            )
        try:
            yield Path(directory)
        finally:
            # Lazy: a killed process may hold its files for a moment longer.
            subprocess.run(["umount", "--lazy", directory], check=True)


def fill(disk: Path, spare_bytes: int = 0) -> Path:
    """Fills the disk up but for `spare_bytes`; returns the file to delete for room.

    A file that is there already may still grow to the end of its last page of 4 KiB.
    """
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        # Whole pages: what is spared is free for others.
        spared_pages = -(-spare_bytes // 4096)
        file.truncate(max(0, file.tell() - spared_pages * 4096))
    return filler


def set_read_only(disk: Path, read_only: bool) -> None:
    """Remounts the disk. To make it read-only, nothing on it may be open for writing."""
    mode = "ro" if read_only else "rw"
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
