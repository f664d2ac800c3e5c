"""The directory of a run: held by one process, made again, nothing left of it when empty."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from jaxsft.run.run_dir import ReplacedError, RunDir, check_room

MIB = 2**20
Usage = namedtuple("Usage", "total used free")

HOLDER = """
import sys
from pathlib import Path
from jaxsft.run.run_dir import RunDir

with RunDir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_trainer_learns_who_holds_it(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    path = tmp_path / "runs" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"trains here \(process {holder.pid}\); wait for it"):
            RunDir(path).__enter__()
        assert path.is_dir()  # it is empty, but not ours to remove
        holder.kill()
    with RunDir(path) as run_dir:
        assert run_dir.is_locked and run_dir.is_there()


def test_only_what_is_empty_and_was_made_here_is_removed(tmp_path: Path) -> None:
    with RunDir(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c").is_dir()
        (tmp_path / "a" / "other").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/other"]
    (tmp_path / "old").mkdir()
    with RunDir(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_what_another_removes_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock, removed = tmp_path / "run", fcntl.flock, []

    def flock(file: int, operation: int) -> None:
        if not removed:
            path.rmdir()  # by its last holder, as it ends
            removed.append(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDir(path) as run_dir:
        assert removed and path.is_dir() and run_dir.is_there()


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_directory_that_vanishes_is_made_again(how: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as run_dir:
        if how == "deleted":
            shutil.rmtree(path)
        else:
            path.rename(tmp_path / "elsewhere")
        if how == "replaced":
            path.mkdir()
        assert not run_dir.is_there()
        run_dir.make_again()
        assert run_dir.is_there() and path.is_dir()
        with pytest.raises(ValueError, match="another process trains here"):
            RunDir(path).__enter__()


def test_a_directory_that_another_took_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as first:
        path.rename(tmp_path / "elsewhere")
        with RunDir(path) as second:
            with pytest.raises(ReplacedError, match="another process trains here"):
                first.make_again()
            assert not first.is_there() and second.is_there()


def test_what_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\): choose an"):
        RunDir(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ValueError, match=r"cannot be written \(File exists\)"):
        RunDir(tmp_path / "file").__enter__()


def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two checkpoints of 300 MiB, a third that is being written, 100 for the adapter, 64 to spare.
    free = 1064 * MIB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    check_room(tmp_path, 300 * MIB, 2)
    free -= 1
    with pytest.raises(ValueError, match="1,064 MiB are needed for 2 checkpoints of 300 MiB, one"):
        check_room(tmp_path, 300 * MIB, 2)
    free = 463 * MIB
    with pytest.raises(ValueError, match="463 MiB free, but 464 MiB are needed for 0 checkpoints"):
        check_room(tmp_path, 300 * MIB, 0)
