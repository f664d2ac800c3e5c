"""From the options of any training run to its loop: files, fork, session, checkpoints, `Run`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic

from rich.console import Console

from jaxsft.cli import EXIT_FAILED, command_line, config_yaml, fail
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.run.checkpoint_files import state_bytes
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fit_deadline import check_fit, fitted
from jaxsft.run.fork import START, Config, Fork, as_begun, describe_fork, with_fork
from jaxsft.run.measure import before_key, load_before
from jaxsft.run.preflight import TimedSteps
from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.report import show_setup
from jaxsft.run.run import (
    Best,
    Measure,
    Run,
    check_not_lost,
    explaining_memory,
    open_run,
    run_to_the_end,
    say_if_finished,
)
from jaxsft.run.run_dir import ReplacedError, check_room
from jaxsft.run.session import Session, session_end
from jaxsft.run.setup import Setup, abstract_state, check_early, restore, trained_model
from jaxsft.run.watchdog import Watchdog
from jaxsft.weights.find import Origin
from jaxsft.weights.peft import save_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Generic[Config]):
    """A run that is not finished, before its rows are read and its model is loaded.

    Attributes:
      config: the options, with those of the adapter that the run starts from.
      yaml: the options as the user gave them, the text of config.yaml.
      fork: the adapter to start from, if not a fresh one.
      origin: the model to train.
      files: the run's files, held against other processes.
      resume_command: the command line that continues the run.
      began_s: when the command began, by time.monotonic.
    """

    config: Config
    yaml: str
    fork: Fork | None
    origin: Origin
    files: RunFiles
    session: Session
    checkpoints: Checkpoints
    console: Console
    resume_command: str
    began_s: float


def start_run(
    command: str,
    config: Config,
    *,
    typed: frozenset[str],
    argv: list[str],
    began_s: float,
    go: Callable[[Started[Config]], int],
) -> int:
    """Says what is known of a finished run, or lets `go` continue it; returns the exit code.

    Args:
      command: its name, such as "jaxsft.train".
      typed: the options that the user gave.
      argv: the command line.
      began_s: when the command began, by time.monotonic.

    Raises:
      ValueError, OSError: bad input.
    """
    resume_command, console = command_line(command, argv), make_console()

    def body() -> int:
        with open_run(config, console) as files:
            forked, fork = with_fork(as_begun(config, files.path), typed)
            yaml = config_yaml(dataclasses.replace(forked, fork_from=config.fork_from))
            if (code := say_if_finished(files, yaml, console)) is not None:
                return code
            if fork is not None:
                console.print(describe_fork(forked))
            end = session_end(config.deadline, config.max_seconds, began_s)
            check_fit(forked, files.path, end)
            check_device()
            origin = check_early(forked)
            configure_jax()
            advice = f"nothing that was saved is lost, to go on: {resume_command}"
            with files, Watchdog(config.hang_seconds, lambda: advice) as watchdog:
                checkpoints = Checkpoints(files.checkpoint_dir, config.save_total_limit)
                num_kept = config.save_total_limit + bool(config.eval_steps)
                if not is_remote(config.output_dir):
                    num_bytes = state_bytes(abstract_state(forked, origin))
                    check_room(files.path, num_bytes, max(num_kept - len(checkpoints.steps()), 0))
                started = Started(
                    config=forked,
                    yaml=yaml,
                    fork=fork,
                    origin=origin,
                    files=files,
                    session=Session(end, watchdog.beat),
                    checkpoints=checkpoints,
                    console=console,
                    resume_command=resume_command,
                    began_s=began_s,
                )
                try:
                    return go(started)
                except (FloatingPointError, ReplacedError) as error:
                    return fail(error, EXIT_FAILED)

    return explaining_memory(body, argv)


def go_on(
    started: Started[Any],
    setup: Setup,
    loop: Callable[[Run, Setup], Setup],
    *,
    measure_now: Measure,
    heldout: str,
    best: Best,
    rows_read: Mapping[str, Any],
    time_steps: Callable[[Setup], tuple[Setup, TimedSteps]],
    preflight: Callable[[Run, Setup], tuple[Setup, TimedSteps, int]] | None = None,
    preflight_only: bool = False,
) -> int:
    """Continues the run from its newest checkpoint to its end; returns the exit code.

    Args:
      setup: at step 0. It is donated.
      heldout: digest of the held-out rows.
      measure_now, best, rows_read: as in `Run`.
      loop, time_steps, preflight, preflight_only: as in `run_to_the_end`.
    """
    config, files, console = started.config, started.files, started.console
    checkpoints = started.checkpoints
    if checkpoints.steps():
        setup = fitted(config, setup, files.path)
    else:
        check_not_lost(files.path, config.save_steps)
    show_setup(console, setup)
    setup = restore(setup, checkpoints, console.print)
    key = before_key(config, setup, heldout)
    run = Run(
        config=config,
        yaml=started.yaml,
        resume_command=started.resume_command,
        console=console,
        session=started.session,
        files=files,
        checkpoints=checkpoints,
        measure_now=measure_now,
        best=best,
        rows_read=rows_read,
        before=load_before(key, setup, files.path),
        before_key=key,
        began_s=started.began_s,
    )
    run.write_files()
    if config.fork_from not in (None, str(files.path / START)):
        save_adapter(files.path / START, trained_model(setup), setup.adapter_config)
    try:
        return run_to_the_end(
            run,
            setup,
            loop,
            time_steps=time_steps,
            preflight=preflight,
            preflight_only=preflight_only,
        )
    except OSError as error:
        advice = f"nothing that was saved is lost, to go on: {started.resume_command}"
        return fail(f"{files.shown}: {error}; {advice}", EXIT_FAILED)
