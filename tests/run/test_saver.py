"""Saving while disks fail: what is said, when it is tried again, and for how long."""

import io
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jaxsft.run import saver
from jaxsft.run.run_dir import ReplacedError, RunDir
from jaxsft.run.saver import Saver
from jaxsft.run.session import Session, SessionEnd


class FakeCheckpoints:
    """Saves end in the background: at the next poll with `fails`, as OSErrors, or well."""

    def __init__(self) -> None:
        self.fails = False
        self.is_saving = False
        self.begun: list[int] = []
        self.saved: list[int] = []

    def save(self, step: int, state: Any, metadata: Any, eval_loss: Any) -> None:
        self.wait()
        self.begun.append(step)
        self.is_saving = True

    def poll(self) -> None:
        if self.is_saving:
            self.is_saving = False
            if self.fails:
                raise OSError(f"the checkpoint of step {self.begun[-1]} couldn't be written (full)")
            self.saved.append(self.begun[-1])

    wait = poll

    def steps(self) -> list[int]:
        return self.saved


class FakeTime:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


class Bench:
    """A saver every 5 steps, all that it needs, and what it said."""

    def __init__(self, run_dir: RunDir | None = None) -> None:
        self.checkpoints, self.out = FakeCheckpoints(), io.StringIO()
        self.new_dirs = 0
        self.received: list[int] = []
        self.beats: list[str] = []
        self.session = Session(SessionEnd(1e12), self.beats.append)
        self.session.interrupted = lambda: bool(self.received)
        console = Console(file=self.out, soft_wrap=True)
        self.pushes = 0
        self.saver = Saver(
            checkpoints=self.checkpoints,  # type: ignore[arg-type]
            metadata={},
            save_steps=5,
            session=self.session,
            console=console,
            run_dir=run_dir,
            on_new_dir=self.on_new_dir,
            push=self.push,
        )

    def push(self) -> None:
        self.pushes += 1

    def on_new_dir(self) -> None:
        self.new_dirs += 1

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            if self.saver.is_due(step):
                self.saver.save(step, None)  # type: ignore[arg-type]

    def finish(self, step: int) -> None:
        self.saver.finish(step, None)  # type: ignore[arg-type]

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    times = SimpleNamespace(monotonic=lambda: fake.now_s, sleep=lambda s: fake.sleep(s))
    monkeypatch.setattr(saver, "time", times)
    return fake


def test_every_nth_step_is_saved_in_silence() -> None:
    bench = Bench()
    bench.steps(1, 12)
    bench.finish(12)
    assert bench.checkpoints.saved == [5, 10, 12] and bench.lines == []
    assert bench.beats == ["saving step 12"] and bench.pushes == 3


def test_failures_are_said_once_and_tried_again() -> None:
    bench = Bench()
    bench.checkpoints.fails = True
    bench.steps(1, 22)
    # Noticed at 6, 11, 16, 21; each save that is due is tried as well as those 10 steps later.
    assert bench.checkpoints.begun == [5, 10, 15, 20] and bench.checkpoints.saved == []
    said = "the checkpoint of step 5 couldn't be written (full); trying again at step 16"
    assert bench.lines == [f"WARNING: {said}"]
    bench.checkpoints.fails = False
    bench.steps(23, 26)
    assert bench.checkpoints.saved == [25]
    assert bench.lines[1:] == ["Saved again: step 25 is on disk."]


def test_a_retry_comes_before_the_next_save() -> None:
    bench = Bench()
    bench.saver._save_steps = 100
    bench.checkpoints.fails = True
    bench.steps(1, 101)  # 100 fails, noticed at 101
    bench.checkpoints.fails = False
    bench.steps(102, 112)
    assert bench.checkpoints.saved == [111]
    bench.steps(113, 150)
    assert bench.checkpoints.saved == [111]


def test_the_clock_learns_how_long_a_save_took(fake_time: FakeTime) -> None:
    bench = Bench()
    bench.steps(5, 5)
    fake_time.now_s += 3
    bench.steps(6, 6)
    assert bench.session.save_s == 3


def test_the_last_state_is_tried_for_ten_minutes(fake_time: FakeTime) -> None:
    bench = Bench()
    bench.steps(1, 6)
    bench.checkpoints.fails = True
    with pytest.raises(OSError, match=r"step 7 could not be saved \(the.*newest checkpoint is st"):
        bench.finish(7)
    assert sum(fake_time.slept) == 600 and set(fake_time.slept) == {5}
    assert bench.checkpoints.begun == [5] + 121 * [7]
    said = "WARNING: the checkpoint of step 7 couldn't be written (full); trying again in 5 s, for "
    assert bench.lines == [said + "10 min 00 s in all"]
    assert len(bench.beats) == 121  # a watchdog with a shorter limit stays quiet


def test_space_that_comes_back_ends_the_wait(fake_time: FakeTime) -> None:
    bench = Bench()
    bench.checkpoints.fails = True
    sleep = fake_time.sleep

    def free_some(seconds: float) -> None:
        sleep(seconds)
        bench.checkpoints.fails = len(fake_time.slept) < 3

    fake_time.sleep = free_some  # type: ignore[method-assign]
    bench.finish(7)
    assert bench.checkpoints.saved == [7] and len(fake_time.slept) == 3
    assert bench.lines[1:] == ["Saved again: step 7 is on disk."]


def test_after_a_signal_it_is_tried_for_seconds(fake_time: FakeTime) -> None:
    bench = Bench()
    bench.received.append(signal.SIGTERM)
    bench.checkpoints.fails = True
    with pytest.raises(OSError, match=r"could not be saved.*; none is there"):
        bench.finish(7)
    assert sum(fake_time.slept) == 15


def test_it_is_not_tried_beyond_the_session(fake_time: FakeTime) -> None:
    bench = Bench()
    end_s = fake_time.now_s + 41
    bench.session.end = SessionEnd(end_s, lambda: fake_time.now_s)
    bench.checkpoints.fails = True
    with pytest.raises(OSError, match="could not be saved"):
        bench.finish(7)
    assert fake_time.now_s < end_s


def test_a_directory_that_has_vanished_is_made_and_saved_to_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as run_dir:
        bench = Bench(run_dir)
        bench.steps(1, 6)
        path.rmdir()
        bench.steps(7, 8)
        assert path.is_dir() and bench.new_dirs == 1
        assert bench.checkpoints.saved == [5, 7]
        assert bench.lines == [
            f"WARNING: {path} has vanished; it was made again, saving there now",
            "Saved again: step 7 is on disk.",
        ]


def test_a_directory_that_cannot_be_made_is_tried_at_every_step(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as run_dir:
        bench = Bench(run_dir)
        path.rmdir()
        path.touch()  # nothing else keeps root from it
        bench.checkpoints.fails = True
        bench.steps(1, 4)
        assert len(bench.lines) == 1 and "has vanished: [Errno 17]" in bench.lines[0]
        path.unlink()
        bench.checkpoints.fails = False
        bench.steps(5, 6)
        assert bench.checkpoints.saved == [5] and bench.new_dirs == 1


def test_another_trainer_that_took_the_directory_ends_this_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as run_dir:
        bench = Bench(run_dir)
        path.rename(tmp_path / "elsewhere")
        with RunDir(path), pytest.raises(ReplacedError, match="another process trains here"):
            bench.steps(1, 1)
