"""The training run, from its options to its results, with the visible loop."""

import dataclasses
import time

import jax
from rich.console import Console

from jaxsft.cli import EXIT_FAILED, EXIT_STOPPED, command_line, fail
from jaxsft.common.batch import batch_hash
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.hosts import join_hosts, reached_preemption
from jaxsft.common.signals import catch_signals, interruptible
from jaxsft.config import TrainConfig
from jaxsft.data.samples import batches
from jaxsft.prepare.report import show_data
from jaxsft.prepare.rows import load_data
from jaxsft.run.checkpoint_files import state_bytes
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fork import ADAPTER, START, as_begun
from jaxsft.run.measure import load_before, measured_of
from jaxsft.run.metrics import MetricsWriter, Throughput
from jaxsft.run.out_of_memory import GENERAL_ADVICE, explain_out_of_memory
from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.report import progress, show_finished, show_result, show_setup, show_stopped
from jaxsft.run.run import (
    Run,
    catch_up,
    check_not_lost,
    is_best,
    is_on_tpu,
    measured,
    preflight,
    run_files,
    save_best,
    save_vanished,
    say,
    watch_metrics,
    write_results,
)
from jaxsft.run.run_dir import ReplacedError, RunDir, check_room
from jaxsft.run.saver import Saver
from jaxsft.run.schedule import SCHEDULE, check_fit, fit_schedule, fitted, forecast
from jaxsft.run.session import Clock, Session, StopNow, session_end_s
from jaxsft.run.setup import (
    Setup,
    abstract_state,
    build,
    check_early,
    restore,
    split_of,
    trained_model,
)
from jaxsft.run.skips import SkippedSteps
from jaxsft.run.watchdog import Watchdog
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.peft import save_adapter

_FORECAST_AFTER = 10  # steps, where no preflight has timed them


def run_training(
    config: TrainConfig, yaml: str, preflight_only: bool, argv: list[str], began_s: float
) -> int:
    """Trains as the options ask; returns the exit code. ValueError and OSError are bad input."""
    console = make_console()
    try:
        with interruptible():
            return command(config, yaml, preflight_only, argv, began_s, console)
    except KeyboardInterrupt:
        again = command_line("jaxsft.train", argv)
        console.print(f"Interrupted, nothing is lost. To go on: {again}")
        return EXIT_STOPPED
    except MemoryError as error:
        return fail(f"out of memory: {error}; {GENERAL_ADVICE}", EXIT_FAILED)
    except jax.errors.JaxRuntimeError as error:
        line = explain_out_of_memory(error, argv)
        if line is None:
            raise
        return fail(line, EXIT_FAILED)


def command(
    config: TrainConfig,
    yaml: str,
    preflight_only: bool,
    argv: list[str],
    began_s: float,
    console: Console,
) -> int:
    """Says what a finished run gave, or starts one that isn't. Errors as in `run_training`."""
    if config.multihost:
        join_hosts()
        console.quiet = jax.process_index() > 0
    with run_files(config) as files:
        path = files.run_dir
        if (path / "result.json").exists():
            if problem := files.push():
                return fail(problem, EXIT_FAILED)
            show_finished(console, path, yaml, files.shown)
            return 0
        clock = Clock(session_end_s(config.deadline, config.max_seconds, began_s))
        return start(config, yaml, files, clock, argv, console, preflight_only)


def start(
    config: TrainConfig,
    yaml: str,
    files: RunFiles,
    clock: Clock,
    argv: list[str],
    console: Console,
    preflight_only: bool,
) -> int:
    """Sets up and runs what isn't finished; errors as in `run_training`."""
    path = files.run_dir
    check_fit(config, path, clock)
    check_device()
    config = as_begun(config, path)
    model = check_early(config)
    configure_jax()
    again = command_line("jaxsft.train", argv)
    advice = f"nothing that was saved is lost, to go on: {again}"
    with RunDir(path) as run_dir, Watchdog(config.hang_seconds, lambda: advice) as watchdog:
        checkpoints = Checkpoints(files.checkpoint_dir, config.save_total_limit)
        num_missing = config.save_total_limit + bool(config.eval_steps) - len(checkpoints.steps())
        if not is_remote(config.output_dir):
            check_room(path, state_bytes(abstract_state(config, model)), max(num_missing, 0))
        watchdog.beat("reading rows")
        data = load_data(config, model, console, lambda: watchdog.beat("reading rows"))
        show_data(console, data.train, data.heldout)
        watchdog.beat("loading the model")
        setup = build(config, data, model, console.print)
        if checkpoints.steps():
            setup = fitted(config, setup, path)
        else:
            check_not_lost(path, config.save_steps)
        show_setup(console, setup)
        setup = restore(setup, checkpoints, console.print)
        before, of = load_before(config, data, setup, path), measured_of(config, data, setup)
        run = Run(config, again, console, run_dir, clock, watchdog, data, before, of, yaml, files)
        run.write_files()
        if config.fork_from not in (None, str(path / START)):
            save_adapter(path / START, trained_model(setup), setup.adapter_config)
        try:
            return run_to_the_end(run, setup, checkpoints, preflight_only)
        except OSError as error:
            return fail(f"{files.shown}: {error}; {advice}", EXIT_FAILED)
        except (FloatingPointError, ReplacedError) as error:
            return fail(error, EXIT_FAILED)


def run_to_the_end(run: Run, setup: Setup, checkpoints: Checkpoints, preflight_only: bool) -> int:
    """Preflight, measurement, training, measurement, results; returns the exit code."""
    config, console, clock = run.config, run.console, run.clock
    timed = None
    with catch_signals() as interrupted:
        session = Session(clock, interrupted, run.watchdog.beat)
        try:
            if preflight_only or is_on_tpu(setup):
                setup, timed, code = preflight(run, setup, session)
                if preflight_only or code:
                    return code
            resume_step = -1 if run.before is None else int(setup.state.step)
            with checkpoints, MetricsWriter(run.path, resume_step) as writer:
                if run.before is None:
                    run.before = measured(run, setup, writer, session)
                    run.write_files()
                clock.measure_s = run.before.get("seconds", 0.0)
                step = int(setup.state.step)
                if config.fit_deadline and not (step and (run.path / SCHEDULE).exists()):
                    setup, line = fit_schedule(config, setup, run.path, clock, timed, session.go_on)
                    console.print(line)
                elif timed is not None:
                    say(console, forecast(config, setup, step, clock, timed.median_s))
                if (run.path / SCHEDULE).exists():
                    run.num_steps = len(setup.step_batches)
                    run.write_files()  # the file may be one of a start that came to nothing
                setup = train(run, setup, checkpoints, writer, session)
                save_adapter(run.path / ADAPTER, trained_model(setup), setup.adapter_config)
                session.go_on("measuring", more_s=clock.measure_s)
                if int(setup.state.step) < len(setup.step_batches):
                    raise StopNow("the machine is to be taken away")
                after = measured(run, setup, writer, session)
                save_vanished(run, setup, checkpoints)
                save_best(run, setup, checkpoints, after)
        except StopNow as stop:
            run.push()
            show_stopped(console, setup, str(stop), clock, run.files.shown, run.command)
            return EXIT_STOPPED
    say(console, writer.problem and f"WARNING: metrics are incomplete: {writer.problem}")
    write_results(run, setup, after)
    if problem := run.files.push():
        return fail(problem, EXIT_FAILED)
    show_result(console, run.path)
    console.print(f"The adapter is in {run.files.shown / ADAPTER}, everything else beside it.")
    return 0


def train(
    run: Run, setup: Setup, checkpoints: Checkpoints, writer: MetricsWriter, session: Session
) -> Setup:
    """The loop, from the state in `setup` to the last step, or to where the session stops it.

    Returns `setup` as it stands then; the one that was given is donated to the steps.
    """
    config, data, console, clock = run.config, run.data, run.console, run.clock
    state, frozen, spec = setup.state, setup.frozen, setup.spec
    first_step, last_step = int(state.step), len(setup.step_batches)
    step = first_step
    metadata = {"fingerprint": setup.fingerprint, "split": split_of(setup)}
    saver = Saver(
        checkpoints,
        metadata,
        config.save_steps,
        run.run_dir,
        run.write_files,
        clock,
        console,
        run.push,
    )
    skipped = SkippedSteps(data.train, setup.step_batches, writer, config.max_nonfinite_steps)
    throughput = Throughput()
    has_problem = False  # with writing metrics
    catch_up(run, setup, checkpoints, writer, session)
    with progress(console, first_step, last_step) as show:
        began_s = time.monotonic()
        for index, batch in batches(setup.step_batches, first_step, config.num_workers):
            step = index + 1
            run.watchdog.beat(f"step {step}")
            on_device = put_batch(batch, spec.mesh)
            with jax.transfer_guard("disallow"):
                state, frozen, scalars = train_step(state, frozen, on_device, spec=spec)
            metrics = {name: float(value) for name, value in jax.device_get(scalars).items()}

            num_tokens = int((batch.segment_ids_BT > 0).sum())
            throughput.update(time.monotonic(), num_tokens)
            metrics["tokens_per_s"] = throughput.tokens_per_s
            metrics["model_flops_per_s"] = setup.flops_per_token * throughput.tokens_per_s
            is_logged = step % config.logging_steps == 0 or step == last_step
            show(step, metrics, throughput.eta_s(last_step - step), is_logged)
            if is_logged:
                named = {f"train/{name}": value for name, value in metrics.items()}
                writer.log(step, named | {"train/batch_hash": batch_hash(batch)})
            say(console, skipped.check(step, metrics))

            if session.why_stop() or reached_preemption(step) or step == last_step:
                break
            loss = None
            if config.eval_steps and step % config.eval_steps == 0:
                now = dataclasses.replace(setup, state=state, frozen=frozen)
                paused_s = time.monotonic()
                try:
                    loss = measured(run, now, writer, session)["loss"]
                except StopNow:
                    break
                throughput.restart_clock(time.monotonic())
                began_s += time.monotonic() - paused_s  # the clock knows measurements by themselves
            if saver.is_due(step) or is_best(loss, checkpoints):
                saver.save(step, state, loss)
            has_problem = watch_metrics(console, writer, has_problem)
            if index > first_step:  # the first one compiles
                clock.add_step(time.monotonic() - began_s)
            began_s = time.monotonic()
            if step == first_step + _FORECAST_AFTER and not is_on_tpu(setup):
                say(console, forecast(config, setup, step, clock, clock.median_step_s))
    if step > first_step:
        saver.finish(step, state, session)
    return dataclasses.replace(setup, state=state, frozen=frozen)
