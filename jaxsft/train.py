"""Fine-tunes a Gemma on reasoning traces: `python -m jaxsft.train [--config RECIPE] [--OPTION …]`.

Measures the model on held-out rows, trains, measures again, and leaves in output_dir/name:
config.yaml, metrics.jsonl, tensorboard/, checkpoints/, samples.jsonl, result.json and adapter/ (a
PEFT directory). The same command again continues an interrupted run, and a finished one says so.

Exit codes: 0 finished, 2 bad input (one line says what), 75 interrupted, run the command again.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxsft.build import Data, Setup, build, load_data
from jaxsft.checkpoint import Checkpoints
from jaxsft.cli import parse_config
from jaxsft.config import TrainConfig
from jaxsft.data import batches
from jaxsft.evaluate import answer_prompts, held_out_loss, is_exact_format, score_format
from jaxsft.metrics import MetricsWriter, Throughput
from jaxsft.peft_io import save_adapter
from jaxsft.report import progress, show_data, show_result, show_setup
from jaxsft.step import TrainState, put_batch, train_step

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

DESCRIPTION = "Fine-tunes a Gemma with LoRA on reasoning traces. Without options: the demo."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        arguments = sys.argv[1:] if argv is None else argv
        config, yaml = parse_config("jaxsft.train", DESCRIPTION, arguments)
        run_dir = Path(config.output_dir) / config.name
        if (run_dir / "result.json").exists():
            show_result(console, json.loads((run_dir / "result.json").read_text()))
            console.print(
                f"{config.name} is finished: its adapter is in {run_dir / 'adapter'}. "
                f"To train again, choose another --name or remove {run_dir}."
            )
            return 0
        # float32 means float32 on accelerators too; their default is bfloat16 passes.
        jax.config.update("jax_default_matmul_precision", "highest")
        data = load_data(config)
        show_data(console, data)
        setup = build(config, data)
        show_setup(console, setup)
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(run_dir / "checkpoints", config.save_total_limit)
        restored = checkpoints.restore(
            setup.state, setup.fingerprint, on_event=lambda line: console.print(f"warning: {line}")
        )
        if restored is not None:
            console.print(f"Continuing from step {restored.step}.")
            setup = dataclasses.replace(setup, state=restored.state)
        (run_dir / "config.yaml").write_text(yaml)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT

    with checkpoints, MetricsWriter(run_dir, int(setup.state.step)) as writer:
        before_file = run_dir / "before.json"
        if not before_file.exists():
            before = measure(config, data, setup, setup.state, writer, console)
            write_json(before_file, before)
        before = json.loads(before_file.read_text())
        state = train(config, data, setup, checkpoints, writer, console)
        if int(state.step) < len(setup.step_batches):
            console.print("Interrupted and saved. To go on, run the same command again.")
            return EXIT_INTERRUPTED
        after = measure(config, data, setup, state, writer, console)
    save_adapter(
        run_dir / "adapter",
        nnx.merge(setup.spec.graphdef, state.adapter, setup.frozen),
        setup.adapter_config,
    )
    write_samples(run_dir / "samples.jsonl", before, after)
    write_json(run_dir / "result.json", {"before": before, "after": after})
    show_result(console, json.loads((run_dir / "result.json").read_text()))
    console.print(f"The adapter is in {run_dir / 'adapter'}, everything else beside it.")
    return 0


def train(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    console: Console,
) -> TrainState:
    """The loop, from the state in `setup` to the last step, or to where a signal stopped it."""
    state, spec = setup.state, setup.spec
    first_step, last_step = int(state.step), len(setup.step_batches)
    metadata = {"fingerprint": setup.fingerprint}
    throughput = Throughput()
    num_nonfinite = 0  # in a row
    interrupted = catch_signals()
    with progress(console, first_step, last_step) as show:
        for index, batch in batches(setup.step_batches, first_step, config.num_workers):
            step = index + 1
            on_device = put_batch(batch, spec.mesh)
            with jax.transfer_guard("disallow"):
                state, scalars = train_step(state, setup.frozen, on_device, spec=spec)
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
                checkpoints.save(step, state, metadata)
            if stop:
                break
            if config.eval_steps and step % config.eval_steps == 0 and step < last_step:
                writer.log(step, {"eval/loss": eval_loss(config, data, setup, state)})
                throughput.restart_clock(time.monotonic())
    checkpoints.wait()
    return state


def catch_signals() -> Callable[[], bool]:
    """Takes over SIGINT and SIGTERM; the result says whether one came. A second one aborts."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, handle)
    return lambda: bool(received)


def eval_loss(config: TrainConfig, data: Data, setup: Setup, state: TrainState) -> float:
    """Held-out loss in nats per completion token; NaN without held-out files."""
    if data.heldout is None:
        return math.nan
    rows, batch_size = data.heldout.packed, config.eval.batch_size
    return held_out_loss(state.adapter, setup.frozen, rows, spec=setup.spec, batch_size=batch_size)


def measure(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    state: TrainState,
    writer: MetricsWriter,
    console: Console,
) -> dict[str, Any]:
    """Held-out loss, and the form of the answers to the first held-out prompts."""
    if data.heldout is None:
        return {}
    step, samples = int(state.step), data.heldout.samples
    console.print(f"Measuring at step {step} on {len(samples)} held-out rows …")
    scores: dict[str, Any] = {"loss": eval_loss(config, data, setup, state)}
    answers: list[dict[str, Any]] = []
    if config.eval.num_prompts:
        generated = answer_prompts(
            state.adapter,
            setup.frozen,
            samples[: config.eval.num_prompts],
            data.tokenizer,
            spec=setup.spec,
            options=config.eval,
        )
        scores |= dataclasses.asdict(score_format(generated))
        system = f"{config.data.system_prompt}\n\n"
        for i, answer in enumerate(generated):
            prompt = answer.prompt.removeprefix(system)
            writer.text(step, f"sample/{i}", f"{prompt}\n\n{answer.text}")
            flags = {"prompt": prompt, "exact_format": is_exact_format(answer.text)}
            answers.append(dataclasses.asdict(answer) | flags)
    writer.log(step, {f"eval/{name}": value for name, value in scores.items()})
    return scores | {"answers": answers}


def write_samples(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """One JSON line a held-out prompt: prompt, reference, and the answers before and after."""
    lines = [
        {
            "prompt": new["prompt"],
            "reference": new["reference"],
            "before": old["text"],
            "after": new["text"],
        }
        for old, new in zip(before.get("answers", []), after.get("answers", []), strict=False)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes whole or not at all; NaN, which JSON lacks, becomes null."""
    finite = {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(finite, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
