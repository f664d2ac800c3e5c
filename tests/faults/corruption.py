"""Damages the files of a checkpoint, one at a time: is every damage found, or without effect?

`cd tests && python -m faults.corruption [--seed 0]` finishes a run of the command, then flips bits
of, truncates, empties and deletes each file of its newest checkpoint, and replaces its directory.
Each time the checkpoint is restored in this process, for one damage of each kind by the command as
well.

detected: the step was set aside, said in one line, and the one before it used
harmless: the newest step's state, bit for bit
missed: anything else

Exit codes: 0 nothing was missed; 1 otherwise.
"""

import argparse
import contextlib
import io
import logging
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from support.child import ChildError
from support.tiny_runs import TinyRuns, checkpoint_arrays, differences, same_arrays

from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail
from jaxsft.run.checkpoints import Checkpoints

DETECTED, HARMLESS, MISSED = "detected", "harmless", "missed"
_NUM_FLIPS = 8  # places in a file: the first byte, the last one, and random ones


class Damage(NamedTuple):
    """What is done to a file of the checkpoint; `file` "." is the directory itself.

    `contents` are the new ones, None for none: the file is deleted. A directory is replaced by an
    empty one, or by a file with the contents.
    """

    kind: str
    file: str
    contents: bytes | None

    def do(self, checkpoint: Path) -> None:
        """Damages it."""
        path = checkpoint / self.file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        if self.contents is not None:
            path.write_bytes(self.contents)
        elif self.file == ".":
            path.mkdir()


class Outcome(NamedTuple):
    """What came of a damage; `verdict` is detected, harmless or missed, `note` says why."""

    damage: Damage
    verdict: str
    note: str


def damages(checkpoint: Path, seed: int) -> Iterator[Damage]:
    """Every damage that is tried, file by file in the order of their names."""
    rng = np.random.default_rng(seed)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        file, contents = str(path.relative_to(checkpoint)), path.read_bytes()
        size = len(contents)
        if size:
            places = {0, size - 1, *rng.integers(size, size=_NUM_FLIPS - 2).tolist()}
            for place in sorted(places):
                flipped = bytearray(contents)
                flipped[place] ^= 1 << int(rng.integers(8))
                yield Damage("a bit flipped", file, bytes(flipped))
            yield Damage("last byte cut", file, contents[:-1])
            yield Damage("emptied", file, b"")
        if size > 2:
            yield Damage("cut in half", file, contents[: size // 2])
        yield Damage("deleted", file, None)
    yield Damage("directory emptied", ".", None)
    yield Damage("directory is a file", ".", b"")


class Sweep:
    """A finished run, and copies of it that are damaged.

    Raises:
      ChildError: the run fails without any damage.
    """

    def __init__(self, runs: TinyRuns, seed: int) -> None:
        self._runs, self._seed = runs, seed
        runs.finish("whole")
        self._source = runs.path("whole") / "checkpoints"
        checkpoints = Checkpoints(self._source, save_total_limit=2)
        steps = checkpoints.steps()
        assert len(steps) == 2, f"{steps}: a step to damage, and one to go back to"
        self.older, self.newest = steps
        self._arrays = {step: checkpoint_arrays(self._source / str(step)) for step in steps}
        whole = checkpoints.restore(self._arrays[self.newest], {}, partly=True)
        assert whole is not None
        self._fingerprint = whole.metadata["fingerprint"]
        self.damages = list(damages(self._source / str(self.newest), seed))

    def restore_each(self) -> list[Outcome]:
        """Every damage, restored in this process."""
        outcomes = []
        # What Orbax leaves behind when it fails complains, some of it later.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()):
            for damage in self.damages:
                directory = self._runs.directory / "damaged"
                shutil.copytree(self._source, directory)
                damage.do(directory / str(self.newest))
                outcomes.append(Outcome(damage, *self._judge(directory)))
                shutil.rmtree(directory)
        return outcomes

    def _judge(self, directory: Path) -> tuple[str, str]:
        events: list[str] = []
        damaged = _files(directory / str(self.newest))
        try:
            with Checkpoints(directory, save_total_limit=2) as checkpoints:
                like = self._arrays[self.newest]
                restored = checkpoints.restore(like, self._fingerprint, on_event=events.append)
        except Exception as error:  # whatever it is, the older step is good
            return MISSED, f"{type(error).__name__}: {error}"
        if restored is None:
            return MISSED, "a restart from zero"
        if not same_arrays(restored.state, self._arrays[restored.step]):
            return MISSED, f"other arrays than those saved, of step {restored.step}"
        if restored.step == self.newest:
            return (MISSED, events[0]) if events else (HARMLESS, "")
        if (
            len(events) != 1
            or "\n" in events[0]
            or str(directory / str(self.newest)) not in events[0]
        ):
            return MISSED, f"said {events} and used step {restored.step}"
        aside = directory / f"{self.newest}.corrupt"
        if _files(aside) != damaged:
            return MISSED, f"{events[0]}; but it is not there as it was"
        return DETECTED, events[0]

    def run_each_kind(self) -> list[Outcome]:
        """One damage of each kind, to the largest file, with the command going on from there."""
        checkpoint = self._source / str(self.newest)
        largest = max(_files(checkpoint).items(), key=lambda item: len(item[1]))[0]
        chosen = {each.kind: each for each in self.damages if each.file in (largest, ".")}
        outcomes = []
        for number, damage in enumerate(chosen.values()):
            name = f"damaged-{number}"
            self._copy_unfinished(name)
            damage.do(self._runs.path(name) / "checkpoints" / str(self.newest))
            outcomes.append(Outcome(damage, *self._judge_run(name)))
        return outcomes

    def _judge_run(self, name: str) -> tuple[str, str]:
        try:
            child = self._runs.finish(name)
        except ChildError as error:
            return MISSED, str(error)
        if found := differences(self._runs.path(name), self._runs.path("whole")):
            return MISSED, "; ".join(found)
        warnings = [line for line in child.out.splitlines() if line.startswith("WARNING: ")]
        if f"\nContinuing from step {self.newest}." in child.out and not warnings:
            return HARMLESS, ""
        if f"\nContinuing from step {self.older}." not in child.out or len(warnings) != 1:
            return MISSED, child.said
        return DETECTED, warnings[0].removeprefix("WARNING: ")

    def run_all_damaged(self) -> list[Outcome]:
        """Both checkpoints with the same damage: the command must refuse and change nothing."""
        outcomes = []
        chosen = {each.kind: each for each in self.damages}
        for number, kind in enumerate(chosen):
            name = f"all-damaged-{number}"
            self._copy_unfinished(name)
            run_dir = self._runs.path(name)
            for step in (self.older, self.newest):
                checkpoint = run_dir / "checkpoints" / str(step)
                same_kind = [each for each in damages(checkpoint, self._seed) if each.kind == kind]
                for damage in {each.file: each for each in same_kind}.values():
                    damage.do(checkpoint)
            before = _files(run_dir)
            verdict, note = self._judge_refusal(name)
            if _files(run_dir) != before:
                verdict, note = MISSED, f"files have changed; {note}"
            outcomes.append(Outcome(Damage(kind, "all files", None), verdict, note))
        return outcomes

    def _judge_refusal(self, name: str) -> tuple[str, str]:
        with self._runs.start(name) as child:
            try:
                code = child.wait()
            except ChildError as error:
                return MISSED, str(error)
        is_refused = code == EXIT_BAD_INPUT and child.err.count("\n") == 1
        return DETECTED if is_refused else MISSED, child.said

    def _copy_unfinished(self, name: str) -> None:
        """The finished run as one that was killed before it wrote its results."""
        results = shutil.ignore_patterns("result.json", "adapter", "samples.jsonl")
        shutil.copytree(self._runs.path("whole"), self._runs.path(name), ignore=results)


def _files(directory: Path) -> dict[str, bytes]:
    """Relative path -> contents of all files; of a file, itself."""
    if directory.is_file():
        return {".": directory.read_bytes()}
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def show(console: Console, title: str, outcomes: Sequence[Outcome]) -> None:
    """Counts by kind of damage, and what was missed."""
    kinds: Mapping[str, Counter[str]] = {each.damage.kind: Counter() for each in outcomes}
    for each in outcomes:
        kinds[each.damage.kind][each.verdict] += 1
    num_files = len({each.damage.file for each in outcomes} - {"."})
    table = Table("", "tried", DETECTED, HARMLESS, MISSED, title=title)
    for kind, counts in [*kinds.items(), ("total", sum(kinds.values(), Counter()))]:
        verdicts = (counts[name] for name in (DETECTED, HARMLESS, MISSED))
        table.add_row(kind, *map(str, (counts.total(), *verdicts)))
    console.print(table)
    console.print(f"{num_files} files tried")
    for each in outcomes:
        if each.verdict == MISSED:
            console.print(f"missed: {each.damage.kind}, {each.damage.file}: {each.note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m faults.corruption")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    args = parser.parse_args(argv)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    tables = []
    with tempfile.TemporaryDirectory(prefix="corruption-") as directory:
        try:
            sweep = Sweep(TinyRuns(Path(directory)), args.seed)
            tables.append(("Restored in this process", sweep.restore_each()))
            tables.append(("The command goes on", sweep.run_each_kind()))
            tables.append(("Both checkpoints damaged: refused", sweep.run_all_damaged()))
        except (ChildError, ValueError, OSError) as error:
            return fail(error, EXIT_FAILED)
    for title, outcomes in tables:
        show(console, title, outcomes)
    return EXIT_FAILED * any(each.verdict == MISSED for _, part in tables for each in part)


if __name__ == "__main__":
    sys.exit(main())
