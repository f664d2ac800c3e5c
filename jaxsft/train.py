"""Fine-tunes a Gemma on reasoning traces: `python -m jaxsft.train [--config RECIPE] [--OPTION …]`.

Measures the model on held-out rows, trains, measures again, and leaves everything in
output_dir/name, the adapter in PEFT format among it. The same command again continues an
interrupted run, and a finished one says so.

Exit codes: 0 finished; 1 the run failed (one line says how; the last checkpoint is good); 2 bad
input (one line says what, nothing was trained); 75 interrupted and saved, run the command again.
"""

import dataclasses
import json
import math
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

from jaxsft.build import Data, Setup, build, check_early, load_data, plain_weights
from jaxsft.checkpoint import Checkpoints
from jaxsft.cli import parse_config
from jaxsft.config import TrainConfig
from jaxsft.data import batches
from jaxsft.evaluate import answer_prompts, held_out_loss, is_exact_format, score_format
from jaxsft.metrics import MetricsWriter, Throughput, write_json
from jaxsft.peft_io import save_adapter
from jaxsft.report import progress, show_data, show_finished, show_result, show_setup
from jaxsft.step import put_batch, train_step

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

DESCRIPTION = "Fine-tunes a Gemma with LoRA on reasoning traces. Without options: the demo."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # No markup: file names may hold brackets.
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    try:
        arguments = sys.argv[1:] if argv is None else argv
        config, yaml = parse_config("jaxsft.train", DESCRIPTION, arguments)
        run_dir = Path(config.output_dir) / config.name
        if (run_dir / "result.json").exists():
            show_finished(console, run_dir, yaml)
            return 0
        path = check_early(config)
        # float32 means float32 on accelerators too; their default is bfloat16 passes.
        jax.config.update("jax_default_matmul_precision", "highest")
        data = load_data(config, path)
        show_data(console, data)
        setup = build(config, data, path)
        show_setup(console, setup)
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(run_dir / "checkpoints", config.save_total_limit)
        restored = checkpoints.restore(
            setup.state, setup.fingerprint, on_event=lambda line: console.print(f"warning: {line}")
        )
        if restored is not None:
            console.print(f"Continuing from step {restored.step}.")
            setup = dataclasses.replace(setup, state=restored.state)
        before = load_before(config, data, setup, run_dir)
        (run_dir / "config.yaml").write_text(yaml, encoding="utf-8")
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    try:
        with catch_signals() as interrupted:
            return run(config, data, setup, before, checkpoints, run_dir, console, interrupted)
    except (FloatingPointError, OSError) as error:
        return fail(error, EXIT_FAILED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "raise gradient_accumulation_steps, or lower data.max_length or eval.batch_size"
        return fail(f"out of memory, {advice}: {str(error).splitlines()[0]}", EXIT_FAILED)


def fail(error: object, code: int) -> int:
    """Prints the error as one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


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


def measured_of(config: TrainConfig, data: Data, setup: Setup) -> dict[str, str]:
    """What a measurement before training depends on, by name."""
    same = {f"eval.{name}": str(value) for name, value in dataclasses.asdict(config.eval).items()}
    heldout = "none" if data.heldout is None else data.heldout.packed.digest()
    start = {name: str(setup.fingerprint[name]) for name in ("model", "model.dtype", "tokenizer")}
    return same | start | {"data.eval_files": heldout, "lora.init_from": str(config.lora.init_from)}


def load_before(
    config: TrainConfig, data: Data, setup: Setup, run_dir: Path
) -> dict[str, Any] | None:
    """The run's measurement before training: None if still to be made, {} if training has begun.

    Raises ValueError when training has begun and it was made with other options.
    """
    path = run_dir / "before.json"
    has_begun = int(setup.state.step) > 0
    if not path.exists():
        return {} if has_begun else None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        there, here = before.pop("of"), measured_of(config, data, setup)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it") from error
    if there == here:
        return dict(before)
    if not has_begun:
        return None
    changed = [
        f"{k} ({there.get(k)} there, {v} here)" for k, v in here.items() if there.get(k) != v
    ]
    raise ValueError(
        f"{path}: was measured with another {'; '.join(changed)}; the table would compare two "
        "things: use the old options, or remove the file to leave 'before' out"
    )


def eval_loss(config: TrainConfig, data: Data, setup: Setup) -> float:
    """Held-out loss in nats per completion token; NaN without held-out files."""
    if data.heldout is None:
        return math.nan
    rows, adapter = data.heldout.packed, setup.state.adapter
    return held_out_loss(
        adapter, setup.frozen, rows, spec=setup.spec, batch_size=config.eval.batch_size
    )


def measure(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    writer: MetricsWriter,
    console: Console,
) -> dict[str, Any]:
    """Held-out loss, and the form of the answers to the first held-out prompts."""
    if data.heldout is None:
        return {}
    step, samples = int(setup.state.step), data.heldout_samples
    console.print(f"Measuring at step {step} on {len(samples)} held-out rows …")
    scores: dict[str, Any] = {"loss": eval_loss(config, data, setup)}
    answers: list[dict[str, Any]] = []
    if config.eval.num_prompts:
        generated = answer_prompts(
            setup.state.adapter,
            plain_weights(setup),
            samples[: config.eval.num_prompts],
            data.tokenizer,
            spec=setup.spec,
            options=config.eval,
        )
        scores |= dataclasses.asdict(score_format(generated))
        system = f"{config.data.system_prompt}\n\n" if config.data.system_prompt else ""
        for i, answer in enumerate(generated):
            prompt = answer.prompt.removeprefix(system)
            writer.text(step, f"sample/{i}", f"{prompt}\n\n{answer.text}")
            flags = {"prompt": prompt, "exact_format": is_exact_format(answer.text)}
            answers.append(dataclasses.asdict(answer) | flags)
    writer.log(step, {f"eval/{name}": value for name, value in scores.items()})
    return scores | {"answers": answers}


def write_samples(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """One JSON line a held-out prompt: prompt, reference, and the answers before and after."""
    new, old = after.get("answers", []), before.get("answers", [])
    lines = [
        {key: answer[key] for key in ("prompt", "reference")}
        | {"before": old[i]["text"] if i < len(old) else None, "after": answer["text"]}
        for i, answer in enumerate(new)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
