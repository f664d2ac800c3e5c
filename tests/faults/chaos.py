"""Kills training with SIGKILL at random moments: does the same command again lose anything?

`cd tests && python -m faults.chaos [--kills 200] [--seed 0] [--jobs 1] [--only grpo]`: each
scenario, of `train` and of `grpo`, is run without a kill first. Then runs of it are killed, about
half of the time while a checkpoint is being written, and started again until they finish. Every
number of every step, the hash of its batch, every completion with its rewards, the checkpoints and
the adapter's bytes must be those of the run that nothing happened to.

Exit codes: 0 no mismatch, and at least a quarter of the kills were during a save; 1 otherwise.
"""

import argparse
import math
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from support.child import Child, ChildError
from support.tiny_grpo import TinyGrpo
from support.tiny_runs import TinyRuns, differences, metrics

from jaxsft.cli import EXIT_FAILED, fail

SCENARIOS: Mapping[str, tuple[str, ...]] = {
    "a sample a row": ("--num_train_epochs", "2"),
    "packed, fused step": (
        *("--data.packing", "true", "--data.max_length", "192"),
        *("--num_train_epochs", "6", "--step", "fused"),
    ),
    "accumulation, dropout": (
        *("--gradient_accumulation_steps", "4", "--lora.dropout", "0.1"),
        *("--num_train_epochs", "2"),
    ),
    "saves and measures at epoch ends": (
        *("--num_train_epochs", "4", "--save_steps", "15", "--eval_steps", "15"),
        *("--eval.num_prompts", "2", "--learning_rate", "0.03"),
    ),
}
# A call of the reward takes as long as a rollout and an update.
GRPO_SCENARIOS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("--max_steps", "30", "--save_steps", "5", "--learning_rate", "3e-4"),
    "grpo, two updates a rollout": (
        *("--objective.num_iterations", "2", "--max_steps", "40", "--save_steps", "4"),
        *("--eval_steps", "10", "--learning_rate", "3e-4"),
    ),
}
MIN_SAVE_SHARE = 0.25
_TARGET_SAVE_SHARE = 0.5
_LATE_SHARE = 0.25  # of the other kills: after the last step
_FINISH_SHARE = 0.5  # of the starts when all steps are taken
_MAX_NTH_SAVE = 4
_POLL_S = 0.001  # a save takes about 0.1 s


@dataclass
class Tally:
    """What the kills did. `lost` has the steps done again after each kill, where any were done."""

    save_steps: int = 0
    runs: int = 0
    kills: int = 0
    kills_during_save: int = 0
    mismatches: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    resumed: Counter[str] = field(default_factory=Counter)  # where -> how often
    seconds: float = 0.0

    @property
    def save_share(self) -> float:
        """Kills during a save, of all kills."""
        return self.kills_during_save / max(self.kills, 1)


class Usual(NamedTuple):
    """A run that nothing happens to; `training_s` is from its first save to its last, `ending_s`
    from there on."""

    num_steps: int
    rows_per_epoch: int
    save_steps: int
    total_s: float
    save_s: float
    training_s: float
    ending_s: float


class Scenario:
    """One config: the runs that nothing happens to, and those that are killed.

    Args:
        runs: where they are made.
        name: of the scenario.
        options: of the command.
        seed: of the moments.
    """

    def __init__(self, runs: TinyRuns, name: str, options: Sequence[str], seed: int) -> None:
        self._runs, self._options = runs, options
        self._name = re.sub(r"\W+", "-", name)  # in directories
        self._rng = np.random.default_rng([seed, *name.encode()])
        self._tally = Tally()

    def kill(self, num_kills: int) -> Tally:
        """Kills and restarts runs until so many kills are done and the last run has finished.

        Raises:
          ChildError: a run that nothing happened to failed, or two of them differ.
        """
        start, tally = time.monotonic(), self._tally
        reference = f"{self._name}-reference"
        self._runs.finish(reference, *self._options)  # compiles, so the next one is measured
        usual = self._measure(f"{self._name}-again", self._runs.path(reference))
        tally.save_steps = usual.save_steps
        while tally.kills < num_kills:
            name = f"{self._name}-{tally.runs}"
            tally.runs += 1
            try:
                self._kill_run(name, usual, num_kills)
                found = differences(self._runs.path(name), self._runs.path(reference))
            except ChildError as error:
                found = [str(error)]
            tally.mismatches += [f"{name}: {each}" for each in found]
            done = f"{tally.kills}/{num_kills} kills, {len(tally.mismatches)} mismatches"
            print(f"{name} finished; {done}", file=sys.stderr, flush=True)
        tally.seconds = time.monotonic() - start
        return tally

    def _start(self, name: str) -> Child:
        # Each run prepares its own rows, so that a kill may come then as well.
        cache = str(self._runs.directory / f"cache-{name}")
        return self._runs.start(name, *self._options, XDG_CACHE_HOME=cache)

    def _measure(self, name: str, reference: Path) -> Usual:
        run_dir, start, started_ns = self._runs.path(name), time.monotonic(), time.time_ns()
        begins, saves = [], []
        with self._start(name) as child:
            while _await(child, lambda: _is_saving(run_dir, started_ns)):
                begins.append(time.monotonic())
                _await(child, lambda: not _is_saving(run_dir, started_ns))
                saves.append(time.monotonic() - begins[-1])
            end = time.monotonic()
            rows = re.search(self._runs.epoch_line, child.out, re.MULTILINE)
        if child.wait() or rows is None or not saves:
            raise ChildError(f"{name}: no rows, no save or no good end; {child.said}")
        if found := differences(run_dir, reference):
            raise ChildError(f"two runs that nothing happened to differ: {found[0]}")
        return Usual(
            num_steps=max(line["step"] for line in metrics(run_dir)),
            rows_per_epoch=int(rows[1].replace(",", "")),
            save_steps=yaml.safe_load((run_dir / "config.yaml").read_text())["save_steps"],
            total_s=end - start,
            save_s=statistics.median(saves),
            training_s=begins[-1] - begins[0],
            ending_s=end - begins[-1],
        )

    def _kill_run(self, name: str, usual: Usual, num_kills: int) -> None:
        """Starts a run again and again until it finishes; ChildError when it doesn't go on."""
        run_dir, tally, done = self._runs.path(name), self._tally, 0
        is_killed = True
        while is_killed:
            started_ns = time.time_ns()
            with self._start(name) as child:
                is_killed = tally.kills < num_kills and self._kill(
                    child, run_dir, started_ns, done, usual
                )
                code = None if is_killed else child.wait()
            if is_killed:
                tally.kills += 1
                tally.kills_during_save += _is_saving(run_dir, started_ns)
            if code or re.search("^(WARNING|error): ", child.out + child.err, re.MULTILINE):
                raise ChildError(child.said)
            done = self._count_resume(child.out, done, usual)
            done = max([done, *(line["step"] for line in metrics(run_dir))])

    def _kill(self, child: Child, run_dir: Path, started_ns: int, done: int, usual: Usual) -> bool:
        """Kills at a random moment; False where the process is to end, or ends, by itself."""
        rng, last = self._rng, usual.num_steps
        saves_left = (last - done) // usual.save_steps
        if saves_left and self._tally.save_share <= _TARGET_SAVE_SHARE:
            self._reach_save(
                child,
                lambda: _is_saving(run_dir, started_ns),
                nth=int(rng.integers(1, min(saves_left, _MAX_NTH_SAVE) + 1)),
                save_s=usual.save_s,
            )
            wait_s = 0.0
        elif done == last and rng.random() < _FINISH_SHARE:
            return False
        elif rng.random() < _LATE_SHARE:
            ends = (f"\nstep {last}/{last} ", f"\nContinuing from step {last}.")
            _await(child, lambda: any(each in child.out for each in ends))
            wait_s = rng.uniform(0, usual.ending_s)
        else:
            wait_s = rng.uniform(0, usual.total_s - usual.training_s * done / last)
        deadline = time.monotonic() + wait_s
        _await(child, lambda: time.monotonic() >= deadline)
        return child.kill()

    def _reach_save(
        self, child: Child, is_saving: Callable[[], bool], nth: int, save_s: float
    ) -> None:
        """Waits for a random moment of the nth save, where the process is stopped (SIGSTOP); if
        that save is over before it, for one of a later save."""
        while child.is_running():
            _await(child, is_saving)
            nth -= 1
            moment_s = time.monotonic() + (self._rng.uniform(0, save_s) if nth <= 0 else math.inf)
            while is_saving() and child.is_running():
                if time.monotonic() >= moment_s:
                    if child.freeze() and is_saving():
                        return
                    child.send(signal.SIGCONT)
                time.sleep(_POLL_S)

    def _count_resume(self, out: str, done: int, usual: Usual) -> int:
        """Counts the steps to do again; returns the step gone on from, `done` if it is not known.

        `done` is the number of steps that had been taken.
        """
        found = re.search(r"^Continuing from step (\d+)\.", out, re.MULTILINE)
        if not done or not (found or "\nstep 1/" in out):
            return done
        step = int(found[1]) if found else 0
        self._tally.lost.append(max(0, done - step))
        epoch, row = divmod(step * self._runs.rows_per_step, usual.rows_per_epoch)
        where = "at step 0" if not step else "mid-epoch" if row else "between epochs"
        self._tally.resumed[where] += 1
        if epoch:
            self._tally.resumed["after epoch 1"] += 1
        # One save is under way while the next one's steps are taken, and that one waits for it.
        if done - step > 2 * usual.save_steps:
            raise ChildError(f"went on from step {step} after step {done}")
        return step


def _await(child: Child, condition: Callable[[], bool]) -> bool:
    """Waits for the condition (True), or the end of the process (False)."""
    while child.is_running():
        if condition():
            return True
        time.sleep(_POLL_S)
    return False


def _is_saving(run_dir: Path, since_ns: int) -> bool:
    """Is there a directory in which Orbax writes a step, and which an earlier kill didn't leave?"""
    for path in run_dir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
        try:
            if path.stat().st_mtime_ns > since_ns:
                return True
        except FileNotFoundError:  # renamed since: saved
            continue
    return False


def run_chaos(
    runs: TinyRuns, scenarios: Mapping[str, Sequence[str]], kills: int, seed: int, jobs: int = 1
) -> dict[str, Tally]:
    """Tallies by scenario; the kills are shared evenly, `jobs` scenarios run at once.

    Raises:
      ChildError: the command fails, or is not reproducible, without any kill.
    """
    share, rest = divmod(kills, len(scenarios))
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: pool.submit(Scenario(runs, name, options, seed).kill, share + (index < rest))
            for index, (name, options) in enumerate(scenarios.items())
        }
        return {name: future.result() for name, future in futures.items()}


def total(tallies: Sequence[Tally]) -> Tally:
    """All of them as one."""
    return Tally(
        save_steps=max(each.save_steps for each in tallies),
        runs=sum(each.runs for each in tallies),
        kills=sum(each.kills for each in tallies),
        kills_during_save=sum(each.kills_during_save for each in tallies),
        mismatches=[line for each in tallies for line in each.mismatches],
        lost=[steps for each in tallies for steps in each.lost],
        resumed=sum((each.resumed for each in tallies), Counter()),
        seconds=sum(each.seconds for each in tallies),
    )


def show(console: Console, tallies: Mapping[str, Tally]) -> None:
    """One line a scenario, one for all, and every mismatch."""
    table = Table("", "runs", "kills", "during a save", "mismatches", title="SIGKILL")
    for name in ("steps lost, mean", "max", "save_steps", "resumed", "minutes"):
        table.add_column(name)
    for name, tally in [*tallies.items(), ("total", total([*tallies.values()]))]:
        lost = (
            (f"{statistics.mean(tally.lost):.1f}", f"{max(tally.lost)}") if tally.lost else ("", "")
        )
        table.add_row(
            *(name, f"{tally.runs}", f"{tally.kills}"),
            f"{tally.kills_during_save} ({tally.save_share:.0%})",
            f"{len(tally.mismatches)}",
            *lost,
            f"{tally.save_steps}",
            ", ".join(f"{count} {where}" for where, count in sorted(tally.resumed.items())),
            f"{tally.seconds / 60:.1f}",
        )
    console.print(table)
    for tally in tallies.values():
        for line in tally.mismatches:
            console.print(f"mismatch: {line}")


def _run_both(directory: Path, args: argparse.Namespace) -> dict[str, Tally]:
    """Tallies of the scenarios of both commands, or of the one that is asked for."""
    kinds: dict[str, tuple[Callable[[Path], TinyRuns], Mapping[str, Sequence[str]]]] = {
        "train": (TinyRuns, SCENARIOS),
        "grpo": (partial(TinyGrpo, slow_reward=True), GRPO_SCENARIOS),
    }
    chosen = {name: kinds[name] for name in kinds if args.only in (None, name)}
    left, tallies = sum(len(scenarios) for _, scenarios in chosen.values()), {}
    kills = args.kills
    for name, (kind, scenarios) in chosen.items():
        share = kills * len(scenarios) // left
        runs = kind(directory / name)
        tallies |= run_chaos(runs, scenarios, share, args.seed, args.jobs)
        kills, left = kills - share, left - len(scenarios)
    return tallies


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m faults.chaos")
    parser.add_argument("--kills", type=int, default=200, help="in all scenarios together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios that run at once")
    parser.add_argument("--only", choices=("train", "grpo"), help="runs of this command")
    args = parser.parse_args(argv)
    if min(args.kills, args.jobs) < 1 or args.seed < 0:
        parser.error("--kills and --jobs must be 1 or more, --seed 0 or more")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        tallies = _run_both(directory, args)
    except (ChildError, ValueError, OSError) as error:
        return fail(f"{error}; see {directory}", EXIT_FAILED)
    show(console, tallies)
    everything = total([*tallies.values()])
    if everything.mismatches:
        console.print(f"The runs are in {directory}.")
    else:
        shutil.rmtree(directory)
    return EXIT_FAILED * (everything.mismatches != [] or everything.save_share < MIN_SAVE_SHARE)


if __name__ == "__main__":
    sys.exit(main())
