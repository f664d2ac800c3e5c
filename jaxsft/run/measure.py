"""Measures held-out rows before, during and after training."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxsft.common.files import write_json
from jaxsft.config import RunConfig, TrainConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.heldout import (
    answer_mask,
    answer_prompts,
    compare_losses,
    held_out_losses,
    read_prompts,
)
from jaxsft.evaluate.scoring import Comparison, compare_answers
from jaxsft.rewards.answer_form import exact_parts
from jaxsft.run.metrics import MetricsWriter
from jaxsft.run.setup import Data, Setup

_BEFORE = "before.json"


def before_key(config: RunConfig, setup: Setup, heldout: str) -> dict[str, str]:
    """What the measurement before training depends on, by name; `heldout` is a digest of the rows.
    Not the batch size: users lower it when memory runs out."""
    options = dataclasses.asdict(config.eval)
    same = {f"eval.{name}": str(options[name]) for name in options if name != "batch_size"}
    start = {name: str(setup.fingerprint[name]) for name in ("model", "model.dtype", "tokenizer")}
    return same | start | {"data.eval_files": heldout, "forked": str(config.fork_from is not None)}


def write_before(run_dir: Path, before: dict[str, Any], of: dict[str, str]) -> None:
    """Keeps the measurement before training for `load_before`; `of` comes from `before_key`."""
    write_json(run_dir / _BEFORE, before | {"of": of})


def load_before(here: dict[str, str], setup: Setup, run_dir: Path) -> dict[str, Any] | None:
    """The run's measurement before training: None where it is still to be made, {} where it is
    missing though training has begun. `here` is the present `before_key`.

    Raises ValueError when training has begun and the measurement was made with other options.
    """
    path = run_dir / _BEFORE
    has_begun = int(setup.state.step) > 0
    if not path.exists():
        return {} if has_begun else None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        there = before.pop("of")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it") from error
    changed = [
        f"{k} ({there.get(k)} there, {v} here)" for k, v in here.items() if there.get(k) != v
    ]
    if not changed:
        return dict(before)
    if not has_begun:
        return None
    raise ValueError(
        f"{path}: was measured with another {'; '.join(changed)}; the table would compare two "
        "things: use the old options, or remove the file to leave 'before' out"
    )


def measure_rows(
    config: TrainConfig,
    data: Data,
    setup: Setup,
    writer: MetricsWriter,
    on_batch: Callable[[], None],
    *,
    console: Console,
) -> dict[str, Any]:
    """Measures held-out losses, and scores the answers to the first held-out prompts.

    `on_batch` is called before each batch and may raise.

    Returns:
      Values by metric, "intervals" (95%, [low, high] by metric) and "answers"; {} without held-out
      files.
    """
    if data.heldout is None:
        return {}
    step, samples, rows = int(setup.state.step), data.heldout_samples, data.heldout.rows
    template = AnswerTemplate(config.data.answer_template)
    num_devices = setup.spec.model.mesh.size
    console.print(f"Measuring at step {step} on {len(samples)} held-out rows …")
    losses = held_out_losses(
        setup.state.adapter,
        setup.frozen,
        rows,
        answer_mask(rows, data.tokenizer, template),
        spec=setup.spec.model,
        batch_size=-(-config.eval.batch_size // num_devices) * num_devices,
        on_batch=on_batch,
    )
    lines = compare_losses(losses)
    answers: list[dict[str, Any]] = []
    if config.eval.num_prompts:
        prompts = read_prompts(
            samples[: config.eval.num_prompts], data.tokenizer, config.data.system_prompt
        )
        generated = answer_prompts(
            setup.state.adapter,
            setup.frozen,
            prompts,
            data.tokenizer,
            spec=setup.spec.model,
            options=config.eval,
            on_batch=on_batch,
        )
        lines += compare_answers(template, generated)
        for i, answer in enumerate(generated):
            flags = {"exact_format": exact_parts(answer.text, template) is not None}
            answers.append(dataclasses.asdict(answer) | flags)
            writer.sample(step, i, answers[-1])
    return log_measured(writer, step, lines, answers)


def log_measured(
    writer: MetricsWriter, step: int, lines: Sequence[Comparison], answers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the values of a measurement; returns what `measure_rows` does."""
    scores = {metric.name: estimates[0].value for metric, estimates, _ in lines}
    writer.log(step, {f"eval/{name}": value for name, value in scores.items()})
    intervals = {
        metric.name: [estimates[0].low, estimates[0].high] for metric, estimates, _ in lines
    }
    counts = {"num_answers": len(answers)} if answers else {}
    return scores | counts | {"intervals": intervals, "answers": answers}
