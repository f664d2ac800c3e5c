"""What surrounds the steps of any trainer: preflight, measuring, saving, stopping, the results."""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
from rich.console import Console

from jaxsft import __version__
from jaxsft.cli import EXIT_FAILED, EXIT_STOPPED, fail
from jaxsft.common.files import cache_dir, write_json, write_text
from jaxsft.common.hosts import from_first, join_hosts
from jaxsft.common.signals import interruptible
from jaxsft.config import RunConfig
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fit_deadline import SCHEDULE, fit_schedule, forecast
from jaxsft.run.fork import ADAPTER, BEST_ADAPTER, CHECKPOINTS
from jaxsft.run.measure import write_before
from jaxsft.run.metrics import MetricsWriter, last_step_of
from jaxsft.run.out_of_memory import explain_out_of_memory
from jaxsft.run.preflight import TimedSteps
from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.report import show_finished, show_result, show_stopped
from jaxsft.run.saver import Saver
from jaxsft.run.session import Session, StopNow
from jaxsft.run.setup import Setup, checkpoint_metadata, trained_model
from jaxsft.weights.peft import save_adapter

# (setup, where metrics and answers are written, a function to call before each batch, which may
# raise) -> values by metric; {} without held-out rows.
Measure = Callable[[Setup, MetricsWriter, Callable[[], None]], dict[str, Any]]


class Best(NamedTuple):
    """Which measurement makes a checkpoint the best: its metric, whether less of it is better, and
    how a person is told."""

    metric: str
    is_lowest: bool
    words: str

    def of(self, found: Mapping[str, Any]) -> float:
        """The measurement as a number of which less is better."""
        return found[self.metric] if self.is_lowest else -found[self.metric]


LOWEST_LOSS = Best("loss", True, "held-out loss was lowest")


@dataclasses.dataclass(kw_only=True)
class Run:
    """What a run has besides its `Setup`, which the steps donate and replace.

    Attributes:
      config, yaml: the options, and the same as the text of config.yaml.
      resume_command: the command line that continues the run.
      files: the run's files, here or on gs://, held against other processes.
      measure_now: measures the held-out rows.
      best: by which of these measurements a checkpoint is the best.
      rows_read: what result.json says of the rows.
      before: what was measured before training; None where that is still to be done.
      before_key: what `before` depends on: it is used again only where this is equal.
      began_s: when this command began, by time.monotonic.
      num_steps: of a schedule that fit_deadline has set.
      writer: metrics on disk; there from the first measurement on.
    """

    config: RunConfig
    yaml: str
    resume_command: str
    console: Console
    session: Session
    files: RunFiles
    checkpoints: Checkpoints
    measure_now: Measure
    best: Best
    rows_read: Mapping[str, Any]
    before: dict[str, Any] | None
    before_key: dict[str, str]
    began_s: float
    num_steps: int | None = None
    writer: MetricsWriter = dataclasses.field(init=False)
    _had_problem: bool = dataclasses.field(init=False, default=False)  # with writing metrics

    @property
    def path(self) -> Path:
        """The run's directory on this machine."""
        return self.files.path

    def say(self, line: str | None) -> None:
        """Prints the line, if there is one."""
        if line is not None:
            self.console.print(line)

    def push(self) -> None:
        """Copies the files to gs:// where the run belongs there; a failure is only a warning."""
        if problem := self.files.push():
            self.console.print(f"WARNING: {problem}", style="bold red")

    def write_files(self) -> None:
        """Writes what the directory holds from the start."""
        write_text(self.path / "config.yaml", self.yaml)
        if self.before:
            write_before(self.path, self.before, self.before_key)
        if self.num_steps is not None:
            write_json(self.path / SCHEDULE, {"num_steps": self.num_steps})

    def saver(self, setup: Setup) -> Saver:
        """What saves the states of the loop that begins with `setup`."""
        return Saver(
            checkpoints=self.checkpoints,
            metadata=checkpoint_metadata(setup),
            save_steps=self.config.save_steps,
            session=self.session,
            console=self.console,
            run_dir=self.files,
            on_new_dir=self.write_files,
            push=self.push,
        )

    def measure(self, setup: Setup) -> dict[str, Any]:
        """Measures the held-out rows; {} without any. The session learns how long that took.

        Raises StopNow where a signal came or there is no time for it.
        """
        began_s = time.monotonic()
        doing = f"measuring at step {int(setup.state.step)}"
        self.session.go_on(doing, more_s=self.session.measure_s)
        found = self.measure_now(setup, self.writer, lambda: self.session.go_on(doing))
        if not found:
            return {}
        seconds = time.monotonic() - began_s
        self.session.add_measurement(seconds)
        said = [f"held-out {self.best.metric} {found[self.best.metric]:.4f}"]
        if "exact_format" in found:
            share = f"{found['exact_format']:.0%} of {found['num_answers']} answers"
            said.append(f"exact format {share}")
        self.console.print(f"  {', '.join(said)}")
        return found | {"seconds": seconds}

    def watch_metrics(self) -> None:
        """Says when writing metrics begins to fail, and when it works again."""
        problem = self.writer.problem
        if self._had_problem != (problem is not None):
            self.say(f"WARNING: {problem}" if problem else "Metrics are written again.")
        self._had_problem = problem is not None


def run_to_the_end(
    run: Run,
    setup: Setup,
    loop: Callable[[Run, Setup], Setup],
    *,
    time_steps: Callable[[Setup], tuple[Setup, TimedSteps]],
    preflight: Callable[[Run, Setup], tuple[Setup, TimedSteps, int]] | None = None,
    preflight_only: bool = False,
) -> int:
    """Preflight, measurement, training by `loop`, measurement, results; returns the exit code.

    Every function returns the new setup; the one it is given is donated.

    Args:
      loop: trains from the state in the setup to the last step, or to where the session stops it.
      time_steps: times a few steps on a copy of the state, to fit the schedule to a deadline.
      preflight: checks and times the step; its exit code is 0 where the run may go on.
      preflight_only: end after it.
    """
    session, timed = run.session, None
    with session.catching_signals():
        try:
            if preflight is not None:
                setup, timed, code = preflight(run, setup)
                if preflight_only or code:
                    return code
            resume_step = -1 if run.before is None else int(setup.state.step)
            with run.checkpoints, MetricsWriter(run.path, resume_step) as run.writer:
                if run.before is None:
                    run.before = run.measure(setup)
                    run.write_files()
                session.measure_s = run.before.get("seconds", 0.0)
                setup = _with_schedule(run, setup, timed, time_steps)
                _catch_up(run, setup)
                first_step = int(setup.state.step)
                setup = loop(run, setup)
                save_adapter(run.path / ADAPTER, trained_model(setup), setup.adapter_config)
                session.go_on("measuring", more_s=session.measure_s)
                if int(setup.state.step) < len(setup.step_batches):
                    raise StopNow("the machine is being preempted")
                after = run.measure(setup)
                _save_vanished(run, setup)
                _save_best(run, setup, after)
        except StopNow as stop:
            run.push()
            show_stopped(
                run.console,
                setup=setup,
                why=str(stop),
                session=session,
                run_dir=run.files.shown,
                resume_command=run.resume_command,
            )
            return EXIT_STOPPED
    run.say(run.writer.problem and f"WARNING: metrics are incomplete: {run.writer.problem}")
    _write_result(run, setup, after, first_step)
    if problem := run.files.push():
        return fail(problem, EXIT_FAILED)
    show_result(run.console, run.path)
    run.say(f"The adapter is in {run.files.shown / ADAPTER}, everything else beside it.")
    return 0


def is_on_tpu(setup: Setup) -> bool:
    """Does the step run on TPUs?"""
    return setup.spec.model.mesh.devices.flat[0].platform == "tpu"


def explaining_memory(body: Callable[[], int], argv: Sequence[str]) -> int:
    """Returns what `body` returns. Where memory ran out, one line names a setting that fits.

    A signal raises KeyboardInterrupt: before training there is nothing to save. `argv` is the
    command line, for the search of a setting.
    """
    try:
        with interruptible():
            return body()
    except jax.errors.JaxRuntimeError as error:
        line = explain_out_of_memory(error, argv)
        if line is None:
            raise
        return fail(line, EXIT_FAILED)


@contextmanager
def open_run(config: RunConfig, console: Console) -> Iterator[RunFiles]:
    """Where the run's files are, with what is already known of the run; joins other processes.

    Of several processes only the first one's files and lines count; the others are silent and write
    into a temporary directory.
    """
    index = 0
    if config.multihost:
        join_hosts()
        index = jax.process_index()
        console.quiet = index > 0
    with ExitStack() as stack:
        output_dir, remote = config.output_dir, is_remote(config.output_dir)
        if index > 0 and not remote:
            output_dir = stack.enter_context(TemporaryDirectory())
        files = RunFiles(output_dir, config.name, cache_dir("remote"), index)
        if remote:
            with files:
                files.pull()
        if config.multihost:
            found = from_first(lambda: _read_all(files.path))
            for name, text in found.items() if index > 0 else ():
                files.path.mkdir(parents=True, exist_ok=True)
                (files.path / name).write_text(text, encoding="utf-8")
        yield files


def say_if_finished(files: RunFiles, yaml: str, console: Console) -> int | None:
    """Shows what a finished run gave and returns the exit code; None for a run to be continued."""
    if not (files.path / "result.json").exists():
        return None
    if problem := files.push():
        return fail(problem, EXIT_FAILED)
    show_finished(console, files.path, yaml, files.shown)
    return 0


def _read_all(run_dir: Path) -> dict[str, str]:
    """The files that say how far a run is."""
    return {path.name: path.read_text(encoding="utf-8") for path in run_dir.glob("*.json")}


def _with_schedule(
    run: Run,
    setup: Setup,
    timed: TimedSteps | None,
    time_steps: Callable[[Setup], tuple[Setup, TimedSteps]],
) -> Setup:
    """The setup with a schedule that fits the session where that is asked for; otherwise a line
    says so where the run will not end in time. The given setup is donated."""
    step, has_schedule = int(setup.state.step), (run.path / SCHEDULE).exists()
    if run.config.fit_deadline and not (step and has_schedule):
        setup, line = fit_schedule(run.config, setup, run.path, run.session, timed, time_steps)
        run.say(line)
    elif timed is not None:
        run.say(forecast(run.config, setup, step, run.session, timed.median_s))
    if (run.path / SCHEDULE).exists():
        run.num_steps = len(setup.step_batches)
        run.write_files()  # the file may be left from a start that never trained
    return setup


def _catch_up(run: Run, setup: Setup) -> None:
    """Makes the measurement that was due at the step the run continues from, if a stop prevented
    it."""
    step, every = int(setup.state.step), run.config.eval_steps
    is_due = every and step and step % every == 0 and step < len(setup.step_batches)
    # Only the first process has the lines written before the stop.
    if is_due and not from_first(lambda: run.writer.has(f"eval/{run.best.metric}")):
        run.checkpoints.add_eval_loss(step, run.best.of(run.measure(setup)))


def is_best(loss: float | None, checkpoints: Checkpoints) -> bool:
    """Is this number, of which less is better, below that of every checkpoint?"""
    if loss is None:
        return False
    try:
        best = checkpoints.best
    except OSError:
        return False  # a save would fail as well
    return best is None or loss < best[1]


def check_not_lost(run_dir: Path, save_steps: int) -> None:
    """ValueError where metrics show training but every checkpoint is gone."""
    reached = last_step_of(run_dir)
    if reached > 2 * save_steps or (run_dir / ADAPTER).exists():
        raise ValueError(
            f"{run_dir}: it had reached step {reached}, but there is no checkpoint any more; bring "
            f"{CHECKPOINTS}/ back, or remove the directory to begin again from step 0"
        )


def _save_vanished(run: Run, setup: Setup) -> None:
    """Writes everything again where the run's directory vanished after the last save."""
    if run.files.is_there():
        return
    run.files.make_again()
    run.write_files()
    run.checkpoints.save(int(setup.state.step), setup.state, checkpoint_metadata(setup))
    run.checkpoints.wait()
    save_adapter(run.path / ADAPTER, trained_model(setup), setup.adapter_config)
    run.say(f"WARNING: {run.path} had vanished; it was made again")


def _save_best(run: Run, setup: Setup, after: Mapping[str, Any]) -> None:
    """Writes the adapter with the lowest held-out loss, where that is not the last step's."""
    best = run.checkpoints.best
    if best is None or not after or best[1] >= run.best.of(after):  # a NaN is never best
        return
    try:
        found = run.checkpoints.restore(setup.state, setup.fingerprint, step=best[0])
    except ValueError as error:
        run.say(f"WARNING: the best step is damaged, {BEST_ADAPTER} is left out: {error}")
        return
    assert found is not None
    setup = dataclasses.replace(setup, state=found.state)
    save_adapter(run.path / BEST_ADAPTER, trained_model(setup), setup.adapter_config)
    run.say(
        f"The {run.best.words} at step {best[0]}, {abs(best[1]):.4f}: that adapter is in "
        f"{run.path / BEST_ADAPTER}."
    )


def _write_result(run: Run, setup: Setup, after: dict[str, Any], first_step: int) -> None:
    """Writes result.json, which marks the run as finished.

    Versions, hardware and time are those of this command, which trained from `first_step` on.
    """
    assert run.before is not None
    seconds, last_step = round(time.monotonic() - run.began_s, 1), int(setup.state.step)
    result = {
        "before": run.before,
        "after": after,
        "data": dict(run.rows_read),
        "command": run.resume_command,
        "program_hash": setup.program_hash,
        "versions": _versions(),
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "hosts": jax.process_count(),
        },
        "run_time": {"seconds": seconds, "from_step": first_step, "to_step": last_step},
    }
    write_json(run.path / "result.json", result)


def _versions() -> dict[str, str]:
    """Of what computes: jaxsft, Python, and the libraries under it."""
    names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"]
    if jax.devices()[0].platform == "tpu":
        names.append("libtpu")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"jaxsft": __version__, "python": platform.python_version()} | found
