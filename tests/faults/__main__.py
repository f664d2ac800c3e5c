"""What becomes of a run under each fault: `python -m benchmarks.faults [--tries 3] [--only NAME]`.

Every row is the real command in processes of its own, on a tiny model: the fault is done to it
`tries` times, and what comes of it is compared with a run that nothing happened to: every number of
every step, the hashes of the batches, the held-out losses, the checkpoints and the adapter's bytes.
Not here, for want of the machines: a TPU that another process has (the messages of libtpu are in
tests/run/test_out_of_memory_advice.py) and the preemption of several hosts.

Exit codes: 0 nothing was wrong; 1 otherwise; 2 there is no such row.
"""

import argparse
import math
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import fault_disks, fault_runs, fault_stops
from benchmarks.chaos import SCENARIOS, run_chaos
from benchmarks.child import Child, ChildError
from benchmarks.corruption import MISSED, Sweep
from benchmarks.fault_bench import STOPPED, Bench, Fault, Row, try_fault
from benchmarks.tiny_run import TinyRuns, train_metrics
from jaxsft.cli import EXIT_FAILED

_LIMIT_KIB = 4 * 2**20  # JAX takes 2 GiB of addresses for itself
_TOO_LARGE = (
    *("--max_steps", "1", "--warmup_steps", "0", "--data.eval_files", "[]"),
    *("--global_batch_size", "2048", "--data.max_length", "256"),
)

# Rows of which one try is a test.
FAULTS: Mapping[str, Fault] = {
    "SIGTERM, SIGINT, SIGHUP": fault_stops.signals,
    "a second signal": fault_stops.second_signal,
    "a signal in set-up": fault_stops.signal_in_setup,
    "the session's end": fault_stops.deadline,
    "a session too short": fault_stops.unusable_deadline,
    "more steps than time": fault_stops.forecast,
    "fit-deadline, kill -9": fault_stops.fit_deadline,
    "a hang": fault_stops.hang,
    "a second trainer, kill -9": fault_stops.second_trainer,
    "two trainers at once": fault_stops.two_at_once,
    "disk full at the start": fault_disks.full_at_start,
    "disk read-only at the start": fault_disks.read_only_at_start,
    "disk full for some steps": fault_disks.full_in_training,
    "disk full to the end": fault_disks.full_to_the_end,
    "disk read-only for some steps": fault_disks.read_only_in_training,
    "stdout on a full disk": fault_disks.full_stdout,
    "directory moved away": fault_disks.directory_moved,
    "directory deleted": fault_disks.directory_deleted,
    "loss not finite": fault_runs.not_finite,
    "adapter beyond measure": fault_runs.not_finite_adapter,
    "loss spikes, kill -9": fault_runs.spikes,
    "another rank, model, data, …": fault_runs.another_run,
    "fork": fault_runs.fork,
    "fork of another model": fault_runs.fork_of_another,
}


def killed(bench: Bench, tries: int) -> Row:
    """kill -9 at random moments, half of them during a save; `benchmarks.chaos` does many."""
    name = next(iter(SCENARIOS))
    row = Row("kill -9, saves included", tries)
    tally = run_chaos(bench.runs, {name: SCENARIOS[name]}, tries, seed=0)[name]
    row.saw = f"Continuing from step … (killed during a save: {tally.kills_during_save})"
    row.lost, row.wrong = tally.lost, tally.mismatches
    return row


def damaged(bench: Bench, tries: int) -> Row:
    """The newest checkpoint damaged; `benchmarks.corruption` tries each of its files."""
    row = Row("checkpoint damaged")
    for seed in range(tries):
        sweep = Sweep(TinyRuns(bench.runs.directory / f"damaged-{seed}"), seed)
        for outcome in sweep.run_each_kind():
            row.tries += 1
            row.saw = outcome.note or row.saw
            row.lost.append(sweep.newest - sweep.older)
            row.expect(outcome.verdict != MISSED, f"{outcome.damage.kind}: {outcome.note}")
    return row


def elastic(bench: Bench, row: Row) -> None:
    """Eight simulated devices, then four, then one: the same batches, losses within 1e-5."""
    name = bench.new_name()
    for num_devices, stop_at in ((8, 4), (4, 12), (1, None)):
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        with bench.start(row, name, XLA_FLAGS=flags) as child:
            if stop_at is not None:
                child.wait_for(f"step {stop_at}/")
                child.send(signal.SIGTERM)
            code = child.wait()
        row.expect(code == (0 if stop_at is None else STOPPED), f"exit code {code}", child)
    row.saw = next(line for line in child.out.splitlines() if line.startswith("A step is split"))
    ours, whole = train_metrics(bench.runs.path(name)), train_metrics(bench.reference)
    hashes = [[line["train/batch_hash"] for line in lines] for lines in (ours, whole)]
    row.expect(hashes[0] == hashes[1], "other batches")
    for line, other in zip(ours, whole, strict=False):
        is_close = math.isclose(line["train/loss"], other["train/loss"], rel_tol=1e-5)
        row.expect(is_close, f"{line} instead of {other}")


def out_of_memory(bench: Bench, row: Row) -> None:
    """A batch too large for the memory that `ulimit` leaves; then with the setting it names."""

    def run(*options: str) -> Child:
        command = [sys.executable, "-m", "jaxsft.train", "--config", str(bench.runs.config)]
        command += ["--name", bench.new_name(), *_TOO_LARGE, *options]
        limited = ["sh", "-c", f"ulimit -v {_LIMIT_KIB}; exec {shlex.join(command)}"]
        with Child(limited, bench.runs.environment, bench.runs.directory / "limited") as child:
            child.wait()
        return child

    child = run()
    row.saw = child.err.splitlines()[-1]
    found = re.search(r"the next smaller setting that fits, by jaxsft.plan: (--.*) \(", row.saw)
    row.expect(child.process.returncode == EXIT_FAILED and found is not None, "no setting", child)
    if found:
        child = run(*found[1].split())
        row.expect(child.process.returncode == 0, "the setting does not fit", child)


# Rows with tests of their own.
OTHERS: Mapping[str, Callable[[Bench, int], Row]] = {
    "kill -9, saves included": killed,
    "checkpoint damaged": damaged,
    "8, then 4, then 1 devices": partial(try_fault, "8, then 4, then 1 devices", elastic),
    "out of memory": partial(try_fault, "out of memory", out_of_memory),
}


def run_row(name: str, bench: Bench, tries: int) -> Row:
    """Any row of the table."""
    try:
        if name in FAULTS:
            return try_fault(name, FAULTS[name], bench, tries)
        return OTHERS[name](bench, tries)
    except ChildError as error:
        return Row(name, tries, wrong=[str(error)])
    except pytest.skip.Exception as reason:  # not allowed to mount
        return Row(name, 0, saw=f"not tried: {reason}")


def show(console: Console, rows: Sequence[Row], directory: Path) -> None:
    """The table, and what was wrong."""
    table = Table("fault", "tries", "what the user saw", "lost steps", "wrong results")
    for row in rows:
        lost = f"{max(row.lost)} at most" if any(row.lost) else "0"
        saw = row.saw.replace(f"{directory}/", "")
        table.add_row(row.fault, str(row.tries), saw, lost, str(len(row.wrong)), end_section=True)
    console.print(table)
    for row in rows:
        for line in row.wrong:
            console.print(f"wrong: {row.fault}: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    names = [*OTHERS, *FAULTS]
    parser.add_argument("--tries", type=int, default=3, help="of each fault")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="one row; may be repeated"
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.tries < 1:
        parser.error("--tries must be 1 or more")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        bench = Bench(Path(directory))
        for name in args.only or names:
            rows.append(run_row(name, bench, args.tries))
            verdict = "WRONG" if rows[-1].wrong else "as it must be"
            print(f"{name}: {verdict}", file=sys.stderr, flush=True)
        show(console, rows, Path(directory))
    command = shlex.join(["python", "-m", "benchmarks.faults", *argv])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    console.print(f"{date.today()}, {machine}: {command}")
    return EXIT_FAILED * any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
