"""The training run, from its options to its results, with the visible loop."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial

import jax

from jaxsft.cli import EXIT_FAILED, fail
from jaxsft.common.batch import Batch, batch_hash
from jaxsft.common.files import cache_dir, write_json
from jaxsft.common.hosts import reached_preemption
from jaxsft.config import TrainConfig
from jaxsft.data.packing import StepBatches
from jaxsft.data.prepared import Prepared, source_of
from jaxsft.data.samples import batches
from jaxsft.prepare.report import show_data
from jaxsft.prepare.rows import Data, load_data
from jaxsft.run.fit_deadline import forecast
from jaxsft.run.measure import measure_rows
from jaxsft.run.metrics import Throughput
from jaxsft.run.preflight import NUM_TIMED_STEPS, TimedSteps, run_preflight, time_steps
from jaxsft.run.report import loss_and_speed, progress, show_preflight
from jaxsft.run.run import LOWEST_LOSS, Run, is_best, is_on_tpu
from jaxsft.run.session import StopNow
from jaxsft.run.setup import Setup, build
from jaxsft.run.skips import SkippedSteps
from jaxsft.run.start import Started, go_on, start_run
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.find import open_tokenizer

_STEPS_TO_TIME = 4  # to fit the schedule to a deadline
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
    return start_run(
        "jaxsft.train",
        config,
        typed=typed,
        argv=argv,
        began_s=began_s,
        go=partial(read_and_train, preflight_only=preflight_only),
    )


def read_and_train(started: Started[TrainConfig], preflight_only: bool) -> int:
    """Reads the rows, loads the model and trains it; returns the exit code."""
    config, session, console = started.config, started.session, started.console
    session.beat("reading rows")
    tokenizer = open_tokenizer(started.origin.tokenizer)
    data = load_data(config.data, tokenizer, console, lambda: session.beat("reading rows"))
    show_data(console, data.train, data.heldout)
    session.beat("loading the model")
    setup = build(config, data, started.origin, console.print, started.fork)

    def timed(setup: Setup) -> tuple[Setup, TimedSteps]:
        setup, _, times = time_steps(setup, _STEPS_TO_TIME, session.go_on)
        return setup, times

    report, heldout = data.train.report, data.heldout
    return go_on(
        started,
        setup,
        partial(train_on_rows, config, data),
        measure_now=partial(measure_rows, config, data, console=console),
        heldout="none" if heldout is None else heldout.rows.digest(),
        best=LOWEST_LOSS,
        rows_read={
            "rows_read": report.rows_read,
            "samples": report.samples,
            "samples_without_reasoning": report.noted.get("plain_completion", 0),
            "tokens": report.num_tokens,
            "loss_tokens": report.num_loss_tokens,
            "heldout_samples": 0 if heldout is None else heldout.report.samples,
        },
        time_steps=timed,
        preflight=partial(check_step, config) if preflight_only or is_on_tpu(setup) else None,
        preflight_only=preflight_only,
    )


def check_step(config: TrainConfig, run: Run, setup: Setup) -> tuple[Setup, TimedSteps, int]:
    """Checks and times the step; returns the new setup, the timed steps, and an exit code that is 0
    where the run may go on. The given setup is donated."""
    if config.fit_deadline:  # then time is no reason to refuse the schedule
        config = dataclasses.replace(config, budget_hours=None)
    run.say(f"Preflight: compiling, {NUM_TIMED_STEPS} timed steps, a comparison …")
    setup, found = run_preflight(config, setup, cache_dir("plan"), run.session.go_on)
    show_preflight(run.console, found)
    write_json(run.path / "preflight.json", found.as_dict())
    code = fail("; ".join(found.problems), EXIT_FAILED) if found.problems else 0
    return setup, found.times, code


def train_on_rows(config: TrainConfig, data: Data, run: Run, setup: Setup) -> Setup:
    """The loop on the run's own rows, from the step that `setup` has reached."""
    step_batches = setup.step_batches
    return train(
        run,
        setup,
        batches=batches(step_batches, int(setup.state.step), config.num_workers),
        rows_of=lambda step: source_rows(data.train, step_batches, step),
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
    with progress(console, first_step, last_step, loss_and_speed) as show:
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
                    loss = run.best.of(run.measure(now))
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
