"""One run of the command: what it knows all along, and its steps other than training."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from rich.console import Console

from jaxsft.cli import EXIT_FAILED, fail
from jaxsft.common.files import cache_dir, write_json
from jaxsft.common.hosts import from_first
from jaxsft.config import TrainConfig
from jaxsft.prepare.rows import Data
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fork import ADAPTER, BEST_ADAPTER, CHECKPOINTS
from jaxsft.run.measure import measure, write_before
from jaxsft.run.metrics import MetricsWriter, last_step_of
from jaxsft.run.preflight import NUM_TIMED_STEPS, TimedSteps, run_preflight
from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.report import show_preflight
from jaxsft.run.run_dir import RunDir
from jaxsft.run.schedule import SCHEDULE
from jaxsft.run.session import Clock, Session
from jaxsft.run.setup import Setup, split_of, trained_model
from jaxsft.run.watchdog import Watchdog
from jaxsft.weights.peft import save_adapter


@dataclasses.dataclass
class Run:
    """What a run has besides its `Setup`, which the steps donate and replace."""

    config: TrainConfig
    command: str
    console: Console
    run_dir: RunDir
    clock: Clock
    watchdog: Watchdog
    data: Data
    before: dict[str, Any] | None  # measured before training; None: still to be done
    measured_of: dict[str, str]
    yaml: str
    files: RunFiles
    num_steps: int | None = None  # of a schedule that fit_deadline has set

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.run_dir.path

    def push(self) -> None:
        """Copies the files to where the run belongs; a copy that fails is said and made up for."""
        if problem := self.files.push():
            self.console.print(f"WARNING: {problem}", style="bold red")

    def write_files(self) -> None:
        """Writes what the directory holds from the start."""
        (self.path / "config.yaml").write_text(self.yaml, encoding="utf-8")
        if self.before:
            write_before(self.path, self.before, self.measured_of)
        if self.num_steps is not None:
            write_json(self.path / SCHEDULE, {"num_steps": self.num_steps})


def is_on_tpu(setup: Setup) -> bool:
    """Does the step run on TPUs?"""
    return setup.spec.mesh.devices.flat[0].platform == "tpu"


@contextmanager
def run_files(config: TrainConfig) -> Iterator[RunFiles]:
    """Where a run's files are, made what is known of the run.

    Processes other than the first of several write theirs for nobody, into a temporary directory.
    """
    index = jax.process_index() if config.multihost else 0
    with ExitStack() as stack:
        output_dir, remote = config.output_dir, is_remote(config.output_dir)
        if index > 0 and not remote:
            output_dir = stack.enter_context(TemporaryDirectory())
        files = RunFiles(output_dir, config.name, cache_dir("remote"), index)
        if remote:
            with RunDir(files.run_dir):
                files.pull()
        if config.multihost:
            found = from_first(lambda: _read_all(files.run_dir))
            for name, text in found.items() if index > 0 else ():
                files.run_dir.mkdir(parents=True, exist_ok=True)
                (files.run_dir / name).write_text(text, encoding="utf-8")
        yield files


def _read_all(run_dir: Path) -> dict[str, str]:
    """The files that say how far a run is."""
    return {path.name: path.read_text(encoding="utf-8") for path in run_dir.glob("*.json")}


def is_best(loss: float | None, checkpoints: Checkpoints) -> bool:
    """Is this held-out loss below that of every step that lies there?"""
    if loss is None:
        return False
    try:
        best = checkpoints.best
    except OSError:
        return False  # a save would fail as well
    return best is None or loss < best[1]


def preflight(run: Run, setup: Setup, session: Session) -> tuple[Setup, TimedSteps, int]:
    """(`setup` as it must be used from now on, the timed steps, exit code: 0 to go on)."""
    config = run.config
    if config.fit_deadline:  # then time is no reason to refuse the schedule
        config = dataclasses.replace(config, budget_hours=None)
    run.console.print(f"Preflight: compiling, {NUM_TIMED_STEPS} timed steps, a comparison …")
    setup, found = run_preflight(config, setup, cache_dir("plan"), session.go_on)
    show_preflight(run.console, found)
    write_json(run.path / "preflight.json", found.as_dict())
    code = fail("; ".join(found.problems), EXIT_FAILED) if found.problems else 0
    return setup, found.times, code


def measured(run: Run, setup: Setup, writer: MetricsWriter, session: Session) -> dict[str, Any]:
    """What `measure` says; the clock learns how long that took.

    Raises StopNow where a signal came or there is no time for it.
    """
    began_s = time.monotonic()
    doing = f"measuring at step {int(setup.state.step)}"
    session.go_on(doing, more_s=run.clock.measure_s)
    found = measure(run.config, run.data, setup, writer, run.console, lambda: session.go_on(doing))
    if not found:
        return {}
    seconds = time.monotonic() - began_s
    run.clock.measure_s = max(run.clock.measure_s, seconds)
    said = [f"held-out loss {found['loss']:.4f}"]
    if "exact_format" in found:
        said.append(f"exact format {found['exact_format']:.0%} of {found['num_answers']} answers")
    run.console.print(f"  {', '.join(said)}")
    return found | {"seconds": seconds}


def write_results(run: Run, setup: Setup, after: dict[str, Any]) -> None:
    """result.json, with all that a finished run is known by."""
    assert run.before is not None
    report, heldout = run.data.train.report, run.data.heldout
    data = {
        "rows_read": report.rows_read,
        "samples": report.samples,
        "tokens": report.num_tokens,
        "loss_tokens": report.num_loss_tokens,
        "heldout_samples": 0 if heldout is None else heldout.report.samples,
    }
    result = {"before": run.before, "after": after, "data": data, "command": run.command}
    write_json(run.path / "result.json", result | {"program_hash": setup.program_hash})


def catch_up(
    run: Run, setup: Setup, checkpoints: Checkpoints, writer: MetricsWriter, session: Session
) -> None:
    """Measures the step that a run goes on from, where the stop came before that was done."""
    step, every = int(setup.state.step), run.config.eval_steps
    is_due = every and step and step % every == 0 and step < len(setup.step_batches)
    # The first process alone has the lines of before.
    if is_due and not from_first(lambda: writer.has("eval/loss")):
        checkpoints.add_eval_loss(step, measured(run, setup, writer, session)["loss"])


def check_not_lost(run_dir: Path, save_steps: int) -> None:
    """ValueError where a run without any checkpoint has been further than it could be then."""
    reached = last_step_of(run_dir)
    if reached > 2 * save_steps or (run_dir / ADAPTER).exists():
        raise ValueError(
            f"{run_dir}: it had reached step {reached}, but there is no checkpoint any more; bring "
            f"{CHECKPOINTS}/ back, or remove the directory to begin again from step 0"
        )


def save_vanished(run: Run, setup: Setup, checkpoints: Checkpoints) -> None:
    """Writes anew what a run has at its end, where its directory vanished after the last save."""
    if run.run_dir.is_there():
        return
    run.run_dir.make_again()
    run.write_files()
    metadata = {"fingerprint": setup.fingerprint, "split": split_of(setup)}
    checkpoints.save(int(setup.state.step), setup.state, metadata)
    checkpoints.wait()
    save_adapter(run.path / ADAPTER, trained_model(setup), setup.adapter_config)
    run.console.print(f"WARNING: {run.path} had vanished; it was made again")


def save_best(run: Run, setup: Setup, checkpoints: Checkpoints, after: Mapping[str, Any]) -> None:
    """Writes the adapter of the lowest held-out loss too, where that isn't the last step's."""
    best = checkpoints.best
    if best is None or best[1] >= after.get("loss", -math.inf):  # a NaN is never best
        return
    try:
        found = checkpoints.restore(setup.state, setup.fingerprint, step=best[0])
    except ValueError as error:
        run.console.print(f"WARNING: the best step is damaged, {BEST_ADAPTER} is left out: {error}")
        return
    assert found is not None
    setup = dataclasses.replace(setup, state=found.state)
    save_adapter(run.path / BEST_ADAPTER, trained_model(setup), setup.adapter_config)
    run.console.print(
        f"The held-out loss was lowest at step {best[0]}, {best[1]:.4f}: that adapter is in "
        f"{run.path / BEST_ADAPTER}."
    )


def watch_metrics(console: Console, writer: MetricsWriter, had_problem: bool) -> bool:
    """Says when writing metrics begins to fail, and when it works again; does it fail?"""
    problem = writer.problem
    if had_problem != (problem is not None):
        console.print(f"WARNING: {problem}" if problem else "Metrics are written again.")
    return problem is not None


def say(console: Console, line: str | None) -> None:
    """Prints the line, if there is one."""
    if line is not None:
        console.print(line)
