"""What becomes of a run under each fault: `python -m benchmarks.faults [--tries 3] [--only NAME]`.

Every row is the real command in processes of its own, on a tiny model: the fault is done to it
`tries` times, and what comes of it is compared with a run that nothing happened to: every number of
every step, the hashes of the batches, the held-out losses, the checkpoints and the adapter's bytes.

Exit codes: 0 nothing was wrong; 1 otherwise; 2 there is no such row.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import fault_disks, fault_runs, fault_stops
from benchmarks.chaos import SCENARIOS, run_chaos
from benchmarks.child import ChildError
from benchmarks.corruption import MISSED, Sweep
from benchmarks.fault_bench import Bench, Fault, Row, try_fault
from benchmarks.tiny_run import TinyRuns
from jaxsft.cli import EXIT_FAILED

# Name -> what is done, with the row of which one try is a test.
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
    row.saw = f"Continuing from step N. ({tally.kills_during_save} kills during a save)"
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


OTHERS = {"kill -9, saves included": killed, "checkpoint damaged": damaged}


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
    parser.add_argument("--only", action="append", choices=names, help="one row; may be repeated")
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
