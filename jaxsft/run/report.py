"""What a run prints: the progress line, the before/after table, two answers."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxsft.evaluate.heldout import METRICS
from jaxsft.evaluate.rewarded import reward_metrics
from jaxsft.evaluate.table import metric_cell
from jaxsft.run.preflight import Preflight
from jaxsft.run.session import Session, duration
from jaxsft.run.setup import Setup, num_adapter_params

_OF_A_SESSION = ("deadline:", "max_seconds:", "fit_deadline:", "hang_seconds:")


def show_setup(console: Console, setup: Setup) -> None:
    """One line about model, adapter, steps and devices, one about the compiled program."""
    info, batches = setup.model_info, setup.step_batches
    mesh = setup.spec.model.mesh
    console.print(
        f"{info.name}: {info.config.num_params:,} frozen parameters, "
        f"{num_adapter_params(setup.state):,} in the adapter; {len(batches):,} steps of "
        f"{batches.global_batch_size} rows on {mesh.size} {mesh.devices.flat[0].device_kind} "
        f"device{'s' if mesh.size > 1 else ''}"
    )
    formulation = "plain" if setup.spec.model.fused is None else "fused"
    console.print(f"train step: {formulation}, program {setup.program_hash}")


def show_preflight(console: Console, found: Preflight) -> None:
    """What the preflight found: one line each on correctness, speed, time, memory, program."""
    apart, memory, seconds = found.difference, found.memory, found.times.seconds
    if apart is None:
        console.print(f"  correct  not compared: {found.not_compared}")
    else:
        console.print(
            f"  correct  {apart.ways} {'agree' if apart.is_small else 'DISAGREE'}: loss "
            f"{apart.loss:.1e} apart (at most {apart.loss_bound:.0e}), gradients "
            f"{apart.gradient:.1e} ({apart.where}; at most {apart.gradient_bound:.0e})"
        )
    planned = found.planned
    plan = "no plan of it was made on this machine: python -m jaxsft.plan with these options"
    if planned is not None:
        ratio = found.seconds_per_step / planned.seconds
        plan = f"{ratio:.2f} × the planned {planned.seconds:.3f} s"
    console.print(
        f"  speed    {found.seconds_per_step:.3f} s a step (median of {len(seconds)}, "
        f"{min(seconds):.3f} to {max(seconds):.3f}), {found.tokens_per_s:,.0f} "
        f"tokens/s; {plan}"
    )
    budget = "null" if found.budget_hours is None else f"{found.budget_hours:g}"
    console.print(
        f"  time     {found.num_steps_left:,} steps take {found.hours:.3g} hours; budget_hours "
        f"{budget}"
    )
    if memory is not None:
        gib = 2**30
        of_step = f"; the step alone is planned at {planned.hbm_bytes / gib:.2f}" if planned else ""
        console.print(
            f"  memory   {memory.peak / gib:.2f} of {memory.limit / gib:.2f} GiB on the fullest "
            f"device since the start, loading included{of_step}"
        )
    console.print(f"  program  {found.program_hash}")


def loss_and_speed(metrics: Mapping[str, float]) -> str:
    """The metrics of a step of supervised training, in a line."""
    tokens_per_s = metrics["tokens_per_s"]
    speed = "–" if math.isnan(tokens_per_s) else f"{tokens_per_s:,.0f}"
    return f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  {speed} tokens/s"


@contextmanager
def progress(
    console: Console,
    first_step: int,
    last_step: int,
    describe: Callable[[Mapping[str, float]], str],
) -> Iterator[Callable[[int, Mapping[str, float], float, bool], None]]:
    """Yields show(step, metrics, eta_s, log): a live line on a terminal, else lines where `log`.

    `describe` makes the text of the metrics.
    """

    def line(step: int, metrics: Mapping[str, float], eta_s: float) -> str:
        eta = "--:--" if math.isnan(eta_s) else str(timedelta(seconds=int(eta_s)))
        return f"step {step}/{last_step}  {describe(metrics)}  ETA {eta}"

    if not console.is_terminal:

        def show(step: int, metrics: Mapping[str, float], eta_s: float, log: bool) -> None:
            if log or step == last_step:
                console.print(line(step, metrics, eta_s))

        yield show
        return
    with Progress(
        BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), console=console
    ) as live:
        task = live.add_task("compiling the first step …", total=last_step, completed=first_step)
        yield lambda step, metrics, eta_s, log: live.update(
            task, completed=step, description=line(step, metrics, eta_s)
        )


def show_stopped(
    console: Console,
    setup: Setup,
    why: str,
    session: Session,
    run_dir: Path | epath.Path,
    resume_command: str,
) -> None:
    """Why a run stopped before its end, what remains and, as the last line, how to go on."""
    step, last_step = int(setup.state.step), len(setup.step_batches)
    left = last_step - step
    remains = "only the last measurement remains"
    if left:
        time_left = session.median_step_s * left
        about = "" if math.isnan(time_left) else f", about {duration(time_left)}"
        remains = f"{left:,} of {last_step:,} steps remain{about}"
    saved = f"step {step:,} is saved" if step else "nothing was trained yet"
    adapter = f", the adapter so far is in {run_dir / 'adapter'}" if step else ""
    console.print(f"Stopped because {why}: {saved}{adapter}; {remains}.")
    console.print(f"To go on, run the same command again: {resume_command}")


def show_finished(console: Console, run_dir: Path, yaml: str, shown: Path | epath.Path) -> None:
    """What a finished run found, and which of its options differ from the present ones."""
    show_result(console, run_dir)
    console.print(f"{shown.name} is finished: its adapter is in {shown / 'adapter'}.")
    was = (run_dir / "config.yaml").read_text(encoding="utf-8").splitlines()
    changed = [
        line.strip()
        for line in yaml.splitlines()
        if line not in was and not line.startswith(_OF_A_SESSION)
    ]
    if changed:
        console.print(f"It was made with other options than now: {', '.join(changed)}.")
    source = run_dir if "://" in str(shown) else shown  # forks are made from local files
    console.print(
        f"To go on from its adapter, for more steps or epochs: the same command with --fork-from "
        f"{source} --name {_free_name(shown)}. To train anew: another --name, or remove {shown}."
    )


def _free_name(run_dir: Path | epath.Path) -> str:
    """A name for a run that goes on from this one."""
    stem, count = run_dir.name, 2
    while run_dir.with_name(f"{stem}-{count}").exists():
        count += 1
    return f"{stem}-{count}"


def show_result(console: Console, run_dir: Path) -> None:
    """The before/after table and one held-out answer before and after, side by side."""
    path = run_dir / "result.json"
    try:
        for table in list(_result_tables(json.loads(path.read_text(encoding="utf-8")))):
            console.print(table)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged ({error!r}); remove it to finish the run again"
        ) from error


def _result_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Those of `show_result`. A file of another form raises what Python raises then."""
    before, after = result["before"], result["after"]
    if not after:
        return
    table = Table("held-out rows", "before", "after", title="Before and after training")
    for metric in (*reward_metrics(after), *METRICS):
        if metric.name in after:
            table.add_row(metric.label, *(metric_cell(side, metric) for side in (before, after)))
    yield table
    if not after.get("answers"):
        return
    # The first whose answer has the form, or the first of all.
    index = next((i for i, a in enumerate(after["answers"]) if a["exact_format"]), 0)
    answer = after["answers"][index]
    sides = Table("before", "after", title=Text(f"Prompt: {answer['prompt']}"), show_lines=True)
    answers = before.get("answers") or []
    old = answers[index]["text"] if index < len(answers) else "–"
    sides.add_row(*(Text(text, overflow="fold") for text in (old, answer["text"])))
    yield sides
