"""Rows of `faults.faults`: signals, the clock, hangs, and a second trainer."""

import contextlib
import fcntl
import json
import os
import re
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

from faults.bench import GO_ON, NUM_STEPS, STEPS, STOPPED, Bench, Row, resumed_from
from support.child import Child
from support.tiny_runs import train_metrics

from jaxsft.run.session import RESERVE_S

_STOPPING = "Stopping soon; once more to stop at once.\n"
_POLL_S = 0.002


def signals(bench: Bench, row: Row) -> None:
    """SIGTERM, SIGINT and SIGHUP, one run after the other, and then on to the end."""
    name = bench.new_name()
    for number, step in ((signal.SIGTERM, 2), (signal.SIGINT, 5), (signal.SIGHUP, 8)):
        with bench.start(row, name) as child:
            child.wait_for(f"step {step}/")
            child.send(number)
            _check_stop(bench, row, child, name)
        row.expect(child.err == _STOPPING, f"stderr is {child.err!r}", child)
    bench.finish(row, name)


def second_signal(bench: Bench, row: Row) -> None:
    """Two signals at once, as the process is stopped when they come."""
    name = bench.new_name()
    with bench.start(row, name) as child:
        child.wait_for("step 12/")
        saved = _steps(bench.runs.path(name))
        child.freeze()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            child.send(number)
        code = child.wait()
    row.saw = f"exit code {code} at once"
    row.expect(code in (128 + signal.SIGTERM, 128 + signal.SIGINT), row.saw, child)
    row.expect(_steps(bench.runs.path(name)) >= saved, f"steps {saved} are gone")
    row.expect("Stopped because" not in child.out, "it went on", child)
    bench.finish(row, name)


def signal_in_setup(bench: Bench, row: Row) -> None:
    """A signal while the model is loaded: nothing is left."""
    for number in (signal.SIGINT, signal.SIGTERM):
        name = bench.new_name()
        with bench.start(row, name) as child:
            child.wait_for("train: ")
            child.send(number)
            code = child.wait()
        row.saw = child.err.strip()
        row.expect(code == STOPPED, f"exit code {code}", child)
        start = "error: interrupted; nothing is lost. To go on: "
        row.expect(row.saw.startswith(start) and "\n" not in row.saw, row.saw)
        row.expect(not bench.runs.path(name).exists(), "there is debris")


def deadline(bench: Bench, row: Row) -> None:
    """The session's end comes near while the machine stands still."""
    name = bench.new_name()
    end = datetime.now().astimezone() + timedelta(seconds=RESERVE_S + 2 * bench.patience_s)
    with bench.start(row, name, "--deadline", end.isoformat()) as child:
        child.wait_for("step 6/")
        child.freeze()
        # The step that stands still is a slow one, and twice as long is kept free.
        left_s = (end - datetime.now().astimezone()).total_seconds() - RESERVE_S
        time.sleep(max(left_s / 3 + 0.5, 0))
        child.send(signal.SIGCONT)
        _check_stop(bench, row, child, name)
    row.expect(datetime.now().astimezone() < end, "it stopped too late", child)
    # The reserve is 2 minutes and two steps, the slow one that stood still among them.
    why = re.search("Stopped because the session ends in [2-9] min", child.out)
    row.expect(why is not None, "no reason, or too late", child)
    bench.finish(row, name)


def unusable_deadline(bench: Bench, row: Row) -> None:
    """Not enough time, and a deadline that is past."""
    for option, value, left in (
        ("--max-seconds", "100", "leaves "),
        ("--deadline", "2020-01-01T00:00Z", "leaves 0 s"),
    ):
        with bench.start(row, bench.new_name(), option, value) as child:
            row.refused(child, value, left, f"{RESERVE_S:.0f} s are kept")
            row.expect(child.out == "", "it came too late", child)


def forecast(bench: Bench, row: Row) -> None:
    """More steps than the session has time for; shortening them then is too late."""
    name = bench.new_name()
    options = ("--max_steps", "1000000", "--max-seconds", "600")
    with bench.runs.start(name, *options) as child:
        child.wait_for("WARNING: ")
        child.kill()
    said = next(line for line in child.out.splitlines() if line.startswith("WARNING: "))
    row.expect("it will stop at about step " in said and "--fit-deadline" in said, said)
    with bench.runs.start(name, *options, "--fit-deadline") as child:
        row.refused(child, "was begun without it, with 1,000,000 steps", "--fork-from")
    row.saw = said


def fit_deadline(bench: Bench, row: Row) -> None:
    """The schedule is shortened to what fits, and stays that when the run is killed and goes on."""
    name = bench.new_name()
    run_dir = bench.runs.path(name)
    limit = ("--max-seconds", f"{RESERVE_S + 1.5 * bench.patience_s:g}", "--fit-deadline")
    options = ("--max_steps", "1000000", "--min_learning_rate", "1e-5", *limit)
    with bench.runs.start(name, *options) as child:
        child.wait_for("step 12/")
        child.kill()
    row.saw = next(line for line in child.out.splitlines() if line.startswith("At "))
    kept, done = (run_dir / "schedule.json").read_text(), len(train_metrics(run_dir))
    for _ in range(10):  # again where the machine has become slower
        with bench.runs.start(name, *options) as child:
            code = child.wait()
        row.lost.append(done - resumed_from(child))
        last = train_metrics(run_dir)[-1]
        done = last["step"]
        if code != STOPPED:
            break
    row.expect(code == 0, f"exit code {code} instead of 0", child)
    row.expect((run_dir / "schedule.json").read_text() == kept, "another schedule")
    row.expect(done == json.loads(kept)["num_steps"], f"it ended at step {done} and not {kept}")
    row.expect(last["train/learning_rate"] < 2e-5, f"the learning rate did not decay: {last}")


def hang(bench: Bench, row: Row) -> None:
    """A stdout that takes nothing any more, from set-up on and from a step on.

    Both at once, as each takes hang_seconds.
    """
    names = [bench.new_name() for _ in range(2)]
    marked = {"XDG_CACHE_HOME": str(bench.runs.directory / names[0])}
    limit, memory = ("--hang-seconds", str(bench.patience_s)), set(os.listdir("/dev/shm"))
    pipes = [bench.runs.directory / f"{name}-pipe" for name in names]
    # Of a pipe's 4096 bytes: no room for a single line, and for about the lines of 15 steps.
    kept_open = [_pipe(*each) for each in zip(pipes, (4096, 2400), strict=True)]
    with (
        bench.start(row, names[0], *limit, stdout=pipes[0], **marked) as in_setup,
        bench.runs.start(names[1], *limit, *STEPS, stdout=pipes[1], **marked) as in_step,
    ):
        for child, where in ((in_setup, "(?!step )"), (in_step, "step ")):
            code = child.wait()
            said = child.err.partition("\n")[0]
            row.expect(code == 1, f"exit code {code} instead of 1")
            is_named = re.match(rf"error: stuck for \d+ (seconds|minutes) in {where}", said)
            row.expect(is_named is not None, f"said {said!r}")
            row.expect("most recent call first" in child.err, "no stacks")
    for each, path in zip(kept_open, pipes, strict=True):
        os.close(each)
        path.unlink()
    row.saw = said
    row.expect(not _processes(marked["XDG_CACHE_HOME"]), "processes are left")
    row.expect(set(os.listdir("/dev/shm")) <= memory, "shared memory is left")
    bench.finish(row, names[1])


def _pipe(path: Path, num_bytes: int) -> int:
    """A named pipe that holds so many of its 4096 bytes already; its open end."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(end, bytes(num_bytes))
    return end


def second_trainer(bench: Bench, row: Row) -> None:
    """Another one while the first is in a step; the first is killed, and the directory is free."""
    name = bench.new_name()
    with bench.start(row, name) as first:
        first.wait_for("step 12/")
        first.freeze()
        with bench.runs.start(name, *STEPS, log=f"{name}-second") as second:
            row.refused(second, "another process trains here", f"(process {first.process.pid})")
            row.expect(second.out == "", "it came too late", second)
        first.kill()
    bench.finish(row, name)


def two_at_once(bench: Bench, row: Row) -> None:
    """Two trainers that start together: one of them goes on, the other is refused."""
    name = bench.new_name()
    with (
        bench.start(row, name) as one,
        bench.runs.start(name, *STEPS, log=f"{name}-second") as other,
    ):
        # As nothing is read of them, the one that goes on waits within its set-up.
        while one.process.poll() is None and other.process.poll() is None:
            time.sleep(_POLL_S)
        winner, loser = (one, other) if one.process.returncode is None else (other, one)
        row.refused(loser, "another process trains here", f"(process {winner.process.pid})")
        bench.check_end(row, winner, bench.runs.path(name))


def _processes(mark: str) -> list[str]:
    """Processes with the text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def _check_stop(bench: Bench, row: Row, child: Child, name: str) -> None:
    """Exit code 75, the steps that remain and the command to go on, and an adapter."""
    code = child.wait()
    row.expect(code == STOPPED, f"exit code {code} instead of {STOPPED}", child)
    done, lines = len(train_metrics(bench.runs.path(name))), child.out.splitlines()
    row.saw = lines[-2]
    row.expect(f"step {done} is saved" in row.saw, f"{row.saw} after step {done}")
    row.expect(f"{NUM_STEPS - done} of {NUM_STEPS} steps remain" in row.saw, row.saw)
    row.expect(lines[-1] == GO_ON + bench.command(name), lines[-1])
    row.expect((bench.runs.path(name) / "adapter").exists(), "no adapter", child)


def _steps(run_dir: Path) -> set[str]:
    """Checkpoints of the run."""
    return {path.name for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()}
