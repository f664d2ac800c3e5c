"""What kills leave is removed, what others work on is not; every command works without flock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsft.common import locks
from jaxsft.common.files import whole_file, write_text
from jaxsft.common.locks import (
    DirectoryLock,
    has_locks,
    remove_leftovers,
    scratch_beside,
    scratch_file,
    scratch_name,
)
from jaxsft.run.run_dir import RunDir

# Prepares rows, writes an adapter's files in a run's directory, and is killed at the nth write,
# rename or fsync, in a process of its own for each n. JAX is not imported.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from support.fake_tokenizer import FakeTokenizer
from jaxsft.common import locks
from jaxsft.common.files import write_text
from jaxsft.config import DataOptions
from jaxsft.data import prepared
from jaxsft.run.run_dir import RunDir

where = Path(sys.argv[1])
if sys.argv[3] == "without":
    import fcntl

    def flock(*_):
        raise OSError(38, "")

    fcntl.flock = flock
ROW = '{"prompt": "p %d", "response": "<think>a thought</think> an answer of a few more words"}\\n'
(where / "rows.jsonl").write_text("".join(ROW % number for number in range(5)))


def work():
    for whole in where.glob("sets/[!.]*/"):
        shutil.rmtree(whole)
    with RunDir(where / "run") as run:
        prepared.prepare(
            where / "rows.jsonl", FakeTokenizer(), DataOptions(max_drop=1), where / "sets"
        )
        (run.path / "adapter").mkdir(exist_ok=True)
        write_text(run.path / "adapter" / "weights", "w" * 9)
        write_text(run.path / "config.yaml", "c")


def killed_at(number):
    left = number

    def dying(name, function):
        def at_last(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return at_last

    os.fsync = dying("fsync", os.fsync)
    for name in ("rename", "replace", "mkdir"):
        setattr(Path, name, dying(name, getattr(Path, name)))
    prepared._ArrayFile.append = dying("append", prepared._ArrayFile.append)
    work()
    os._exit(0)


number = 0
while True:
    number += 1
    if (child := os.fork()) == 0:
        killed_at(number)
    if os.waitpid(child, 0)[1] == 0:
        break
    left = [path for path in where.rglob("*") if ".partial-" in path.name or path.suffix == ".tmp"]
    print(number, len(left), flush=True)
work()
"""


@pytest.mark.parametrize("flock", ["with", "without"])
def test_what_kills_leave_is_removed_by_the_next_command(flock: str, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(tests), flock],
        env=os.environ | {"PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    counts = [int(line.split()[1]) for line in said.stdout.splitlines()]
    # Kills at ten places and more; most left something, and never what an earlier one had left.
    assert len(counts) >= 10 and sum(map(bool, counts)) >= 5 and max(counts) <= 2, counts
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        ["rows.jsonl", "config.yaml", "weights", "files.json", "manifest.json"]
        + [f"{name}.npy" for name in ("tokens", "loss_mask", "sample_offsets", "sample_rows")]
        + ["row_samples.npy", "row_offsets.npy"]
    )
    # By every process but the first, which ends before it has a directory to lock.
    assert said.stderr.count("has no locks") == (flock == "without") * (len(counts) + 1)


def renamed(name: str, **parts: object) -> str:
    """The name of a scratch with other parts."""
    named = dict(
        zip(("machine", "container", "pid", "began", "unique"), name.split("-"), strict=True)
    )
    return "-".join(str(each) for each in (named | parts).values())


def mine(name: str) -> str:
    return name


def ended(name: str) -> str:
    return renamed(name, began=int(name.split("-")[3]) - 1)  # another got its number


def container(name: str) -> str:
    return renamed(name, container=7, pid=1)


def machine(name: str) -> str:
    return renamed(name, machine="0" * 8)


def nameless(name: str) -> str:
    return "killed"


def make_old(path: Path) -> None:
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - 90_000,) * 2)


@pytest.mark.parametrize(
    ("change", "goes_if"),
    [
        (mine, ""),
        (ended, "always"),
        (container, "old or has locks"),
        (machine, "old or has locks of its own"),
        (nameless, "old or has locks of its own"),  # of an earlier version
    ],
)
@pytest.mark.parametrize("is_old", [False, True], ids=["young", "old"])
@pytest.mark.parametrize("place", ["local", "shared", "without locks"])
def test_whose_a_scratch_is(
    change: Callable[[str], str],
    goes_if: str,
    is_old: bool,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place == "without locks":
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    monkeypatch.setattr(locks, "_is_shared", lambda directory: place == "shared")
    name = change(scratch_name())
    directory, file = tmp_path / f".out.partial-{name}", tmp_path / f"out.json.{name}.tmp"
    (directory / "inner").mkdir(parents=True)
    users = tmp_path / "my.tmp"
    for each in (file, users):
        each.touch()
    if is_old:
        make_old(tmp_path)
    removed = remove_leftovers(tmp_path)
    always, old = goes_if == "always", is_old and "old" in goes_if
    has_locks = "locks" in goes_if and place != "without locks"
    is_free = has_locks and ("own" not in goes_if or place == "local")
    assert directory.exists() != (always or old or is_free)
    assert file.exists() != (always or (old and change != nameless)) and users.exists()
    assert len(removed) == (not directory.exists()) + (not file.exists())


def test_what_is_locked_stays_however_old(tmp_path: Path) -> None:
    scratch = tmp_path / f".out.partial-{machine(scratch_name())}"
    with DirectoryLock(scratch):
        make_old(tmp_path)
        assert remove_leftovers(tmp_path) == []


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with scratch_beside(tmp_path / "out") as scratch, whole_file(tmp_path / "one") as partial:
        partial.touch()
        assert remove_leftovers(tmp_path) == [] and scratch.exists()
        write_text(tmp_path / "one", "of another process, which is faster")
        with RunDir(tmp_path):
            assert partial.exists() and scratch.exists()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = renamed(scratch_name(), pid=child.pid, began=locks._stat(child.pid)[1])
    (tmp_path / f"out.{name}.tmp").touch()
    assert remove_leftovers(tmp_path) == []
    child.send_signal(signal.SIGKILL)
    while locks._stat(child.pid)[0] != "Z":  # nobody has asked how it ended, as in many containers
        time.sleep(0.01)
    assert len(remove_leftovers(tmp_path)) == 1
    child.communicate()


def test_a_held_directory_has_no_files_of_another_machine(tmp_path: Path) -> None:
    file = scratch_file(tmp_path / "adapter" / "weights")
    file.parent.mkdir()
    file = file.with_name(f"weights.{machine(scratch_name())}.tmp")
    file.touch()
    with RunDir(tmp_path):
        assert not file.exists()


def failing(code: int) -> Callable[[int, int], None]:
    def flock(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize(
    "code",
    [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EPERM],
    ids=errno.errorcode.get,
)
def test_without_locks_work_goes_on_and_it_is_said_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    locks._said.clear()
    with RunDir(tmp_path / "run") as run_dir, RunDir(tmp_path / "run"):
        assert not run_dir.is_locked and run_dir.is_there()
    with scratch_beside(tmp_path / "out") as scratch:
        assert scratch.is_dir()
    with DirectoryLock(tmp_path / "data"):
        assert not has_locks(tmp_path / "data")
    err = capfd.readouterr().err
    why = os.strerror(code)
    assert err.startswith(f"{tmp_path}/run: its file system has no locks ({why}), so nothing keeps")
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []
