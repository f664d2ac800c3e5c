"""What becomes of a run under each fault: `cd tests && python -m faults [--tries 3] [--only NAME]`.

Every row is the real command in processes of its own, on a tiny model: the fault is done to it
`tries` times, and what comes of it is compared with a run that nothing happened to: every number of
every step, the hashes of the batches, the held-out losses, the checkpoints and the adapter's bytes.
Kills and damaged checkpoints have commands of their own, `faults.chaos` and `faults.corruption`.

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
from faults import disks, runs, stops
from faults.bench import Bench, Fault, Row, try_fault
from rich.console import Console
from rich.table import Table
from support.child import ChildError

from jaxsft.cli import EXIT_FAILED

FAULTS: Mapping[str, Fault] = {
    "SIGTERM, SIGINT, SIGHUP": stops.signals,
    "a second signal": stops.second_signal,
    "a signal in set-up": stops.signal_in_setup,
    "the session's end": stops.deadline,
    "a session too short": stops.unusable_deadline,
    "more steps than time": stops.forecast,
    "fit-deadline, kill -9": stops.fit_deadline,
    "a hang": stops.hang,
    "a second trainer, kill -9": stops.second_trainer,
    "two trainers at once": stops.two_at_once,
    "disk full at the start": disks.full_at_start,
    "disk read-only at the start": disks.read_only_at_start,
    "disk full for some steps": disks.full_in_training,
    "disk full to the end": disks.full_to_the_end,
    "disk read-only for some steps": disks.read_only_in_training,
    "stdout on a full disk": disks.full_stdout,
    "directory moved away": disks.directory_moved,
    "directory deleted": disks.directory_deleted,
    "loss not finite": runs.not_finite,
    "adapter beyond measure": runs.not_finite_adapter,
    "loss spikes, kill -9": runs.spikes,
    "another rank, model, data, …": runs.another_run,
    "fork": runs.fork,
    "fork of another model": runs.fork_of_another,
}


def run_row(name: str, bench: Bench, tries: int) -> Row:
    """A row of the table; one with no tries where this process may not mount a small disk."""
    try:
        return try_fault(name, FAULTS[name], bench, tries)
    except ChildError as error:
        return Row(name, tries, wrong=[str(error)])
    except pytest.skip.Exception as reason:
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
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m faults")
    parser.add_argument("--tries", type=int, default=3, help="of each fault")
    parser.add_argument(
        "--only", action="append", choices=FAULTS, metavar="NAME", help="one row; may be repeated"
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.tries < 1:
        parser.error("--tries must be 1 or more")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        bench = Bench(Path(directory))
        for name in args.only or FAULTS:
            rows.append(run_row(name, bench, args.tries))
            verdict = "WRONG" if rows[-1].wrong else "as it must be"
            print(f"{name}: {verdict}", file=sys.stderr, flush=True)
        show(console, rows, Path(directory))
    command = shlex.join(["python", "-m", "faults", *argv])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    console.print(f"{date.today()}, {machine}: {command}")
    return EXIT_FAILED * any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
