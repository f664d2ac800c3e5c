"""Fine-tunes a Gemma on reasoning traces: `python -m jaxsft.train [--config RECIPE] [--OPTION …]`.

Measures the model on held-out rows, trains, measures again, and leaves everything in
output_dir/name, the adapter in PEFT format among it. The same command again continues an
interrupted run, and a finished one says so. `--preflight` checks the step on this machine, times it
and stops; on a TPU every run begins with that.

Exit codes: 0 finished; 1 the preflight or the run failed (one line says how; the last checkpoint is
good); 2 bad input (one line says what, nothing was trained); 75 interrupted and saved, run the
command again.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxsft.build import Setup, build, check_early
from jaxsft.checkpoint import Checkpoints
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, cache_dir, fail, parse_config
from jaxsft.config import TrainConfig
from jaxsft.data import batches
from jaxsft.json_file import write_json
from jaxsft.measure import eval_loss, load_before, measure, measured_of, write_samples
from jaxsft.metrics import MetricsWriter, Throughput
from jaxsft.peft_io import save_adapter
from jaxsft.preflight import NUM_TIMED_STEPS, run_preflight
from jaxsft.prepare import Data, load_data
from jaxsft.prepare_report import show_data
from jaxsft.report import (
    progress,
    show_finished,
    show_preflight,
    show_result,
    show_setup,
)
from jaxsft.step import put_batch, train_step

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

DESCRIPTION = (
    "Fine-tunes a Gemma with LoRA on reasoning traces. Without options: the demo. --preflight "
    "checks the train step on this machine against another way to compute it, times it on the "
    "run's own rows and stops, with exit code 1 when it disagrees or the run would take longer "
    "than budget_hours; on a TPU every run begins with that."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # No markup: file names may hold brackets.
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    try:
        preflight_only, rest = parse_preflight(sys.argv[1:] if argv is None else argv)
        config, yaml = parse_config("jaxsft.train", DESCRIPTION, rest)
        if config.multihost:
            join_hosts(preflight_only)
            console.quiet = jax.process_index() > 0
        run_dir = Path(config.output_dir) / config.name
        if (run_dir / "result.json").exists():
            show_finished(console, run_dir, yaml)
            return 0
        path = check_early(config)
        # float32 means float32 on accelerators too; their default is bfloat16 passes.
        jax.config.update("jax_default_matmul_precision", "highest")
        data = load_data(config, path, console)
        show_data(console, data.train, data.heldout)
        setup = build(config, data, path)
        show_setup(console, setup)
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoints = None
        if jax.process_count() == 1:
            checkpoints = Checkpoints(run_dir / "checkpoints", config.save_total_limit)
            setup = restore(setup, checkpoints, console)
        before = load_before(config, data, setup, run_dir)
        (run_dir / "config.yaml").write_text(yaml, encoding="utf-8")
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    except jax.errors.JaxRuntimeError as error:
        return fail_for_memory(error)
    try:
        with catch_signals() as interrupted:
            if preflight_only or is_on_tpu(setup):
                setup, code = preflight(config, setup, run_dir, console, interrupted)
                if preflight_only or code:
                    return code
            assert checkpoints is not None  # several processes stop after the preflight
            return run(config, data, setup, before, checkpoints, run_dir, console, interrupted)
    except (FloatingPointError, OSError) as error:
        return fail(error, EXIT_FAILED)
    except jax.errors.JaxRuntimeError as error:
        return fail_for_memory(error)


def fail_for_memory(error: jax.errors.JaxRuntimeError) -> int:
    """The exit code for a device that is out of memory, said in a line; raises other errors."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    advice = (
        "raise gradient_accumulation_steps, set model.remat to full, or lower data.max_length or "
        "eval.batch_size (jaxsft.plan --search finds what fits)"
    )
    return fail(f"out of memory, {advice}: {str(error).splitlines()[0]}", EXIT_FAILED)


def parse_preflight(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """(is `--preflight` among the arguments, the others); ValueError where it has a value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preflight", action="store_true")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return found.preflight, rest


def join_hosts(preflight_only: bool) -> None:
    """Makes this process one of several, before anything touches its devices.

    Raises ValueError where there are no others, and where more than a preflight is wanted of them.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"multihost: no other processes to join ({error}); JAX finds them on the hosts of a "
            "TPU slice and under Slurm or Open MPI, elsewhere leave it out"
        ) from error
    if jax.process_count() > 1 and not preflight_only:
        raise ValueError(
            f"multihost: checkpoints need all devices in one process, here are "
            f"{jax.process_count()}; only --preflight runs on several so far"
        )


def is_on_tpu(setup: Setup) -> bool:
    """Does the step run on TPUs?"""
    return setup.spec.mesh.devices.flat[0].platform == "tpu"


def restore(setup: Setup, checkpoints: Checkpoints, console: Console) -> Setup:
    """`setup` with the state of the newest good checkpoint, if there is any."""
    restored = checkpoints.restore(
        setup.state, setup.fingerprint, on_event=lambda line: console.print(f"warning: {line}")
    )
    if restored is None:
        return setup
    console.print(f"Continuing from step {restored.step}.")
    return dataclasses.replace(setup, state=restored.state)


def preflight(
    config: TrainConfig,
    setup: Setup,
    run_dir: Path,
    console: Console,
    interrupted: Callable[[], bool],
) -> tuple[Setup, int]:
    """(`setup` as it must be used from now on, exit code: 0 when the run may start)."""
    console.print(f"Preflight: compiling, {NUM_TIMED_STEPS} timed steps, a comparison …")
    setup, found = run_preflight(config, setup, cache_dir("plan"), interrupted)
    if found is None:
        console.print("Interrupted, nothing is lost. To go on, run the same command again.")
        return setup, EXIT_INTERRUPTED
    show_preflight(console, found)
    if jax.process_index() == 0:
        write_json(run_dir / "preflight.json", found.as_dict())
    if found.problems:
        return setup, fail("; ".join(found.problems), EXIT_FAILED)
    return setup, 0


def run(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    before: dict[str, Any] | None,
    checkpoints: Checkpoints,
    run_dir: Path,
    console: Console,
    interrupted: Callable[[], bool],
) -> int:
    """Measures unless `before` is known, trains, measures, writes the results."""
    with checkpoints, MetricsWriter(run_dir, int(setup.state.step)) as writer:
        if before is None:
            before = measure(config, data, setup, writer, console)
            write_json(run_dir / "before.json", before | {"of": measured_of(config, data, setup)})
        if not interrupted():
            setup = train(config, data, setup, checkpoints, writer, console, interrupted)
        if int(setup.state.step) < len(setup.step_batches):
            console.print("Interrupted, nothing is lost. To go on, run the same command again.")
            return EXIT_INTERRUPTED
        after = measure(config, data, setup, writer, console)
    model = nnx.merge(setup.spec.graphdef, setup.state.adapter, setup.model_weights)
    save_adapter(run_dir / "adapter", model, setup.adapter_config)
    write_samples(run_dir / "samples.jsonl", before, after)
    result = {"before": before, "after": after, "program_hash": setup.program_hash}
    write_json(run_dir / "result.json", result)
    show_result(console, run_dir)
    console.print(f"The adapter is in {run_dir / 'adapter'}, everything else beside it.")
    return 0


def train(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    console: Console,
    interrupted: Callable[[], bool],
) -> Setup:
    """The loop, from the state in `setup` to the last step, or to where a signal stopped it.

    Returns `setup` as it stands then; the one that was given is donated to the steps.
    """
    state, frozen, spec = setup.state, setup.frozen, setup.spec
    first_step, last_step = int(state.step), len(setup.step_batches)
    throughput = Throughput()
    num_nonfinite = 0  # in a row
    with progress(console, first_step, last_step) as show:
        for index, batch in batches(setup.step_batches, first_step, config.num_workers):
            step = index + 1
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
                writer.log(step, {f"train/{name}": value for name, value in metrics.items()})

            if metrics["num_loss_tokens"] > 0:
                num_nonfinite = 0 if metrics["applied"] else num_nonfinite + 1
            if num_nonfinite == config.max_nonfinite_steps:
                raise FloatingPointError(
                    f"loss or gradient not finite in steps {step - num_nonfinite + 1} to {step}; "
                    "no such update was applied"
                )
            stop = interrupted()
            if stop or step % config.save_steps == 0 or step == last_step:
                checkpoints.save(step, state, {"fingerprint": setup.fingerprint})
            if stop:
                break
            if config.eval_steps and step % config.eval_steps == 0 and step < last_step:
                now = dataclasses.replace(setup, state=state, frozen=frozen)
                writer.log(step, {"eval/loss": eval_loss(config, data, now)})
                throughput.restart_clock(time.monotonic())
    checkpoints.wait()
    return dataclasses.replace(setup, state=state, frozen=frozen)


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Takes over SIGINT and SIGTERM; yields whether one came. A second one ends the process."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"Stopping soon; once more to stop at once.\n")  # print is not reentrant

    handlers = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    sys.exit(main())
