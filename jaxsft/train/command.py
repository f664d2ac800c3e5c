"""The training run, from its options to its results, with the visible loop."""

import dataclasses
import time
from collections.abc import Callable, Iterable

import jax
from rich.console import Console

from jaxsft.cli import (
    EXIT_FAILED,
    command_line,
    config_yaml,
    fail,
)
from jaxsft.common.batch import Batch, batch_hash
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.hosts import reached_preemption
from jaxsft.config import TrainConfig
from jaxsft.data.packing import StepBatches
from jaxsft.data.prepared import Prepared, source_of
from jaxsft.data.samples import batches
from jaxsft.prepare.report import show_data
from jaxsft.prepare.rows import load_data
from jaxsft.run.checkpoint_files import state_bytes
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fit_deadline import check_fit, fitted, forecast
from jaxsft.run.fork import START, Fork, as_begun, describe_fork, with_fork
from jaxsft.run.measure import before_key, load_before
from jaxsft.run.metrics import Throughput
from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.report import progress, show_setup
from jaxsft.run.run import (
    Run,
    check_not_lost,
    explaining_memory,
    is_best,
    is_on_tpu,
    open_run,
    run_to_the_end,
    say_if_finished,
)
from jaxsft.run.run_dir import ReplacedError, check_room
from jaxsft.run.session import Session, SessionEnd, StopNow, session_end
from jaxsft.run.setup import Setup, abstract_state, build, check_early, restore, trained_model
from jaxsft.run.skips import SkippedSteps
from jaxsft.run.watchdog import Watchdog
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.find import open_tokenizer
from jaxsft.weights.peft import save_adapter

_FORECAST_AFTER = 10  # steps, where no preflight has timed them


def run_training(
    *,
    config: TrainConfig,
    typed: frozenset[str],
    preflight_only: bool,
    argv: list[str],
    began_s: float,
) -> int:
    """Trains as the options ask; returns the exit code. ValueError and OSError are bad input.

    `typed` are the options that the user gave, `argv` is the command line, `began_s` when the
    command began, by time.monotonic.
    """
    resume_command, console = command_line("jaxsft.train", argv), make_console()

    def body() -> int:
        with open_run(config, console) as files:
            forked, fork = with_fork(as_begun(config, files.path), typed)
            yaml = config_yaml(dataclasses.replace(forked, fork_from=config.fork_from))
            if (code := say_if_finished(files, yaml, console)) is not None:
                return code
            if fork is not None:
                console.print(describe_fork(forked))
            return start(
                config=forked,
                yaml=yaml,
                fork=fork,
                files=files,
                end=session_end(config.deadline, config.max_seconds, began_s),
                began_s=began_s,
                resume_command=resume_command,
                console=console,
                preflight_only=preflight_only,
            )

    return explaining_memory(body, argv)


def start(
    *,
    config: TrainConfig,
    yaml: str,
    fork: Fork | None,
    files: RunFiles,
    end: SessionEnd,
    began_s: float,
    resume_command: str,
    console: Console,
    preflight_only: bool,
) -> int:
    """Sets up and runs what is not finished; errors as in `run_training`.

    `end` is when the session ends, `began_s` when the command began, by time.monotonic;
    `resume_command` continues the run.
    """
    path = files.path
    check_fit(config, path, end)
    check_device()
    model = check_early(config)
    configure_jax()
    advice = f"nothing that was saved is lost, to go on: {resume_command}"
    with files, Watchdog(config.hang_seconds, lambda: advice) as watchdog:
        session = Session(end, watchdog.beat)
        checkpoints = Checkpoints(files.checkpoint_dir, config.save_total_limit)
        num_to_come = config.save_total_limit + bool(config.eval_steps) - len(checkpoints.steps())
        if not is_remote(config.output_dir):
            check_room(path, state_bytes(abstract_state(config, model)), max(num_to_come, 0))
        session.beat("reading rows")
        tokenizer = open_tokenizer(model.tokenizer)
        data = load_data(config.data, tokenizer, console, lambda: session.beat("reading rows"))
        show_data(console, data.train, data.heldout)
        session.beat("loading the model")
        setup = build(config, data, model, console.print, fork)
        if checkpoints.steps():
            setup = fitted(config, setup, path)
        else:
            check_not_lost(path, config.save_steps)
        show_setup(console, setup)
        setup = restore(setup, checkpoints, console.print)
        run = Run(
            config=config,
            yaml=yaml,
            resume_command=resume_command,
            console=console,
            session=session,
            files=files,
            checkpoints=checkpoints,
            data=data,
            before=load_before(config, data, setup, path),
            before_key=before_key(config, data, setup),
            began_s=began_s,
        )
        run.write_files()
        if config.fork_from not in (None, str(path / START)):
            save_adapter(path / START, trained_model(setup), setup.adapter_config)
        try:
            return run_to_the_end(run, setup, train_on_rows, preflight_only)
        except OSError as error:
            return fail(f"{files.shown}: {error}; {advice}", EXIT_FAILED)
        except (FloatingPointError, ReplacedError) as error:
            return fail(error, EXIT_FAILED)


def train_on_rows(run: Run, setup: Setup) -> Setup:
    """The loop on the run's own rows, from the step that `setup` has reached."""
    step_batches = setup.step_batches
    return train(
        run,
        setup,
        batches=batches(step_batches, int(setup.state.step), run.config.num_workers),
        rows_of=lambda step: source_rows(run.data.train, step_batches, step),
    )


def source_rows(data: Prepared, step_batches: StepBatches, step: int) -> list[str]:
    """The source rows, each as "file:row 17", of the batch of `step` (from 1), in its order."""
    rows = data.rows
    return [
        source_of(data, int(sample))
        for row in step_batches.row_indices(step - 1)
        if row >= 0
        for sample in rows.row_samples[rows.row_offsets[row] : rows.row_offsets[row + 1]]
    ]


def train(
    run: Run,
    setup: Setup,
    *,
    batches: Iterable[tuple[int, Batch]],
    rows_of: Callable[[int], list[str]],
) -> Setup:
    """The loop, from the state in `setup` to the last step, or to where the session stops it.

    Args:
      setup: donated to the steps.
      batches: (number of finished steps, this process's share of the next batch), in order, from
        the step that `setup` has reached.
      rows_of: the source rows of a step (from 1), for the report on a step that was skipped.

    Returns the setup as it stands then.
    """
    config, console, session, writer = run.config, run.console, run.session, run.writer
    state, frozen, spec = setup.state, setup.frozen, setup.spec
    first_step, last_step = int(state.step), len(setup.step_batches)
    saver, throughput = run.saver(setup), Throughput()
    skipped = SkippedSteps(rows_of, writer, config.max_nonfinite_steps)
    step = first_step
    with progress(console, first_step, last_step) as show:
        for index, batch in batches:
            step = index + 1
            # ---- The step ----
            session.beat(f"step {step}")
            on_device = put_batch(batch, spec.model.mesh)
            with jax.transfer_guard("disallow"):
                state, frozen, scalars = train_step(state, frozen, on_device, spec=spec)
            metrics = {name: float(value) for name, value in jax.device_get(scalars).items()}

            # ---- What people and programs see of it ----
            throughput.update(time.monotonic(), int((batch.segment_ids_BT > 0).sum()))
            metrics["tokens_per_s"] = throughput.tokens_per_s
            metrics["model_flops_per_s"] = setup.flops_per_token * throughput.tokens_per_s
            is_logged = step % config.logging_steps == 0 or step == last_step
            show(step, metrics, throughput.eta_s(last_step - step), is_logged)
            if is_logged:
                named = {f"train/{name}": value for name, value in metrics.items()}
                writer.log(step, named | {"train/batch_hash": batch_hash(batch)})
            run.say(skipped.check(step, metrics))

            # ---- Stop, measure, save ----
            if session.why_stop() or reached_preemption(step) or step == last_step:
                break
            loss = None
            if config.eval_steps and step % config.eval_steps == 0:
                try:
                    now = dataclasses.replace(setup, state=state, frozen=frozen)
                    loss = run.measure(now)["loss"]
                except StopNow:
                    break
                throughput.restart_clock(time.monotonic())
            if saver.is_due(step) or is_best(loss, run.checkpoints):
                saver.save(step, state, loss)
            run.watch_metrics()
            session.step_done()
            if step == first_step + _FORECAST_AFTER and not is_on_tpu(setup):
                run.say(forecast(config, setup, step, session, session.median_step_s))
    if step > first_step:
        saver.finish(step, state)
    return dataclasses.replace(setup, state=state, frozen=frozen)
