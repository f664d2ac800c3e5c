"""A run's directory: locked against a second trainer, and checked for free space."""

import os
from pathlib import Path
from typing import Self

from jaxsft.common.files import check_free_space
from jaxsft.common.locks import DirectoryLock, LockedError, remove_leftovers


class ReplacedError(Exception):
    """Another process has taken or continued the run; the text says so."""


class RunDir(DirectoryLock):
    """Makes `path` and holds it while it is entered; nothing is left of it when it is still empty.

    What killed processes left in it is removed on entering.

    Raises, on entering, ValueError when another process holds it or it cannot be written.
    """

    def __enter__(self) -> Self:
        try:
            super().__enter__()
            for directory, _, _ in os.walk(self.path):
                remove_leftovers(Path(directory), is_held=self.is_locked)
            return self
        except LockedError as error:
            raise ValueError(self._is_held(error)) from None
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}): choose an output_dir that is a "
                "writable directory"
            ) from error

    def make_again(self) -> None:
        """Makes and holds the directory after it has vanished.

        Raises OSError where that fails, ReplacedError where another process holds it by now.
        """
        try:
            self.hold()
        except LockedError as error:
            raise ReplacedError(self._is_held(error)) from error

    def _is_held(self, error: LockedError) -> str:
        return (
            f"{self.path}: another process trains here{error.holder}; wait for it or stop it, or "
            "choose another --name"
        )


def check_room(run_dir: Path, checkpoint_bytes: int, num_checkpoints: int) -> None:
    """ValueError unless `run_dir` has room for so many checkpoints more, one half-written, and for
    the adapter."""
    check_free_space(
        run_dir,
        checkpoint_bytes * (num_checkpoints + 1) + checkpoint_bytes // 3,
        what=f"{num_checkpoints} checkpoints of {checkpoint_bytes / 2**20:,.0f} MiB, one that is "
        "being written and the adapter",
        advice="free some space, choose another output_dir or lower save_total_limit",
    )
