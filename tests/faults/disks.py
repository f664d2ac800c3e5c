"""Rows of `faults.faults`: disks that are full or read-only, directories that vanish."""

import shutil
import subprocess
import time
from pathlib import Path

from faults.bench import NUM_STEPS, Bench, Row, until
from support.child import Child
from support.small_disk import fill, set_read_only, small_disk

_DISK_BYTES = 100 * 2**20  # 64 MiB must be free at the start


def full_at_start(bench: Bench, row: Row) -> None:
    """Too little space, before the model is loaded."""
    with small_disk(_DISK_BYTES) as disk:
        fill(disk, spare_bytes=30 * 2**20)
        with bench.start(row, bench.new_name(), *_output(disk)) as child:
            row.refused(child, "30 MiB free", "save_total_limit")
        row.expect(child.out == "", "it came too late", child)
        row.expect([path.name for path in disk.iterdir()] == ["filler"], "there is debris")


def read_only_at_start(bench: Bench, row: Row) -> None:
    """A disk that can't be written to."""
    with small_disk(_DISK_BYTES) as disk:
        set_read_only(disk, True)
        with bench.start(row, bench.new_name(), *_output(disk)) as child:
            row.refused(child, "cannot be written (Read-only file system)")
        row.expect(child.out == "", "it came too late", child)


def full_in_training(bench: Bench, row: Row) -> None:
    """No space from step 4 until a save has failed."""
    with small_disk(_DISK_BYTES) as disk:
        name = bench.new_name()
        with bench.start(row, name, *_output(disk)) as child:
            child.wait_for("step 4/")
            filler = fill(disk)
            until(child, lambda: "couldn't be written" in child.out, "warning")
            filler.unlink()
            _check_end(bench, row, child, disk / name)
        _check_warned(row, child.out, "No space left on device")


def full_to_the_end(bench: Bench, row: Row) -> None:
    """No space from step 4 until all steps are done and the last save has failed."""
    with small_disk(_DISK_BYTES) as disk:
        name = bench.new_name()
        with bench.start(row, name, *_output(disk)) as child:
            child.wait_for("step 4/")
            filler = fill(disk)
            until(child, lambda: "trying again in 5 s, for 10 min" in child.out, "second try")
            row.expect(f"\nstep {NUM_STEPS}/" in child.out, "it did not go on", child)
            filler.unlink()
            _check_end(bench, row, child, disk / name)
        _check_warned(row, child.out, "No space left on device")
        row.expect(f"Saved again: step {NUM_STEPS} is on disk." in child.out, "not saved", child)


def read_only_in_training(bench: Bench, row: Row) -> None:
    """The disk becomes read-only, as after an I/O error, and can be written again later."""
    with small_disk(_DISK_BYTES) as disk:
        name = bench.new_name()
        with bench.start(row, name, *_output(disk)) as child:
            child.wait_for("step 4/")
            _make_read_only(disk)
            until(child, lambda: "couldn't be written" in child.out, "warning")
            set_read_only(disk, False)
            _check_end(bench, row, child, disk / name)
        _check_warned(row, child.out, "Read-only file system")


def full_stdout(bench: Bench, row: Row) -> None:
    """What the command prints goes to a full disk: it is lost, and nothing else is."""
    with small_disk(2**20) as disk:
        name = bench.new_name()
        fill(disk)
        with bench.start(row, name, stdout=disk / "log") as child:
            bench.check_end(row, child, bench.runs.path(name))
        row.expect(child.err == "", f"stderr is {child.err!r}")
        row.saw = "nothing"


def directory_moved(bench: Bench, row: Row) -> None:
    """The run's directory is moved away."""
    name = bench.new_name()
    run_dir = bench.runs.path(name)
    with bench.start(row, name) as child:
        child.wait_for("step 6/")
        run_dir.rename(run_dir.with_name(f"{name}-moved"))
        _check_made_again(bench, row, child, run_dir)


def directory_deleted(bench: Bench, row: Row) -> None:
    """The run's directory is deleted."""
    name = bench.new_name()
    run_dir = bench.runs.path(name)
    with bench.start(row, name) as child:
        child.wait_for("step 6/")
        shutil.rmtree(run_dir.rename(run_dir.with_name(f"{name}-moved")))
        _check_made_again(bench, row, child, run_dir)


def _output(disk: Path) -> tuple[str, str]:
    return "--output_dir", str(disk)


def _check_end(bench: Bench, row: Row, child: Child, run_dir: Path) -> None:
    """Like `bench.check_end`, but a checkpoint before the last one may be missing."""
    missing = {path.name for path in (bench.reference / "checkpoints").iterdir()}
    missing -= {str(NUM_STEPS), *(path.name for path in (run_dir / "checkpoints").glob("*"))}
    bench.check_end(row, child, run_dir)
    row.wrong = [
        line
        for line in row.wrong
        if not any(line.startswith(f"checkpoint {step}: ") for step in missing)
    ]


def _check_warned(row: Row, out: str, reason: str) -> None:
    warnings = [line for line in out.splitlines() if line.startswith("WARNING: ")]
    of_saving = [line for line in warnings if "couldn't be written" in line]
    row.expect(any(reason in line for line in of_saving), f"warnings: {warnings}")
    row.expect("\nSaved again: step " in out, "it was not saved again")
    row.saw = of_saving[0] if of_saving else ""


def _check_made_again(bench: Bench, row: Row, child: Child, run_dir: Path) -> None:
    _check_end(bench, row, child, run_dir)
    said = [line for line in child.out.splitlines() if "has vanished" in line]
    row.expect(len(said) == 1 and "saving there now" in said[0], f"said {said}", child)
    row.expect("\nSaved again: step " in child.out, "not saved", child)
    row.saw = said[0] if said else ""
    for file in ("config.yaml", "before.json"):
        row.expect((run_dir / file).exists(), f"{file} is missing")


def _make_read_only(disk: Path) -> None:
    """As soon as no file is open for writing, which the mount demands."""
    while True:
        try:
            return set_read_only(disk, True)
        except subprocess.CalledProcessError:
            time.sleep(0.002)
