"""What the terminal shows of a plan, on one screen."""

from collections import Counter

from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from jaxsft.config import TrainConfig
from jaxsft.plan.chips import CHIPS, GIB
from jaxsft.plan.estimate import CALIBRATION, StepEstimate
from jaxsft.plan.run_plan import RunPlan
from jaxsft.plan.search import Setting

HASH_OF_GUESSED_STEPS = (
    "Only --max_steps or --lengths data tell the number of steps for sure: with another number "
    "train logs another hash."
)
NOTHING_FITS = "No number of micro-batches and no remat policy makes it fit: use more devices."


def show_plan(console: Console, plan: RunPlan, *, from_cache: bool) -> None:
    """Fit, time, FLOPs, collectives, data, and what the numbers rest on."""
    config, estimate = plan.config, plan.estimate
    options = config.lora
    console.print(
        f"{config.name}: {plan.model_config.name} ({plan.source}), LoRA r {options.r} on "
        f"{options.target_modules}; a step is {config.global_batch_size} rows × "
        f"{config.data.max_length:,} tokens in {config.gradient_accumulation_steps} "
        f"micro-batch{'es' if config.gradient_accumulation_steps > 1 else ''}, "
        f"remat {config.model.remat}, {plan.formulation} step"
    )
    if config.step == "auto" and plan.fused_obstacles:
        console.print(f"The fused step is not for {'; '.join(plan.fused_obstacles)}.")
    console.print(f"{estimate.num_chips} chips, {estimate.topology}. {_verdict(plan)}")
    tables = [_memory_table(estimate)] if estimate.hbm_bytes else []
    if estimate.fits:
        tables.append(_time_table(plan))
    console.print(Columns(tables, padding=(0, 4)))
    if estimate.fits:
        _show_flops(console, plan)
        _show_collectives(console, estimate)
    _show_data(console, plan)
    _show_basis(console, estimate, from_cache)
    if not plan.steps_are_exact:
        console.print(HASH_OF_GUESSED_STEPS)


def _verdict(plan: RunPlan) -> str:
    estimate = plan.estimate
    used, limit = estimate.hbm_total_gib, estimate.hbm_limit_bytes / GIB
    if not estimate.fits:
        return f"DOES NOT FIT: it needs {estimate.misfit} a chip."
    line = f"Fits: {used:.2f} GiB a chip of {limit:.2f}. {plan.seconds_per_step:.3f} s a step"
    if plan.hours is None:
        return f"{line}; give --lengths for the number of steps"
    line += f" × {plan.steps:,} steps = {plan.hours:.1f} h"
    if plan.config.budget_hours is None:
        return line
    verdict = "OVER" if plan.is_over_budget else "within"
    return f"{line}, {verdict} the budget of {plan.config.budget_hours:g} h"


def _memory_table(estimate: StepEstimate) -> Table:
    table = Table("HBM per chip", "GiB", title="Memory")
    table.columns[1].justify = "right"
    for kind, num_bytes in estimate.hbm_bytes.items():
        table.add_row(kind, f"{num_bytes / GIB:.2f}")
    table.add_section()
    left = estimate.hbm_limit_bytes / GIB - estimate.hbm_total_gib
    table.add_row("headroom" if left >= 0 else "too much", f"{abs(left):.2f}")
    return table


def _time_table(plan: RunPlan) -> Table:
    """Seconds of a step by part, the largest first."""
    table = Table("part", "ms", "share", title="Time of a step (estimate)")
    if plan.steps is not None:
        table.add_column("h of the run")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, seconds: float) -> None:
        hours = [] if plan.steps is None else [f"{seconds * plan.steps / 3600:.2f}"]
        share = seconds / plan.seconds_per_step
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{share:.0%}", *hours)

    for part, seconds in sorted(plan.parts.items(), key=lambda item: -item[1]):
        if seconds >= 0.00005:
            row(part, seconds)
    table.add_section()
    row("all", plan.seconds_per_step)
    return table


def _show_flops(console: Console, plan: RunPlan) -> None:
    flops, estimate = plan.flops, plan.estimate
    tokens = estimate.num_positions
    recomputed = estimate.recomputed_flops / estimate.matmul_flops
    console.print(
        f"FLOPs a step: the model's {flops.total:.3e}, the compiled matmuls' "
        f"{estimate.matmul_flops:.3e}, {plan.compiled_ratio:.2f} × as many, {recomputed:.1%} of "
        "them recomputed."
    )
    console.print(
        f"LoRA-MFU {plan.lora_mfu:.1%}: {flops.base / tokens / 1e9:.3g} GFLOP a token (forward and "
        "activation gradients of the frozen weights, and attention; no adapters, no recomputation) "
        f"of {CHIPS[estimate.chip].peak_flops / 1e12:.0f} bf16 TFLOP/s a chip."
    )


def _show_collectives(console: Console, estimate: StepEstimate) -> None:
    if not estimate.collectives:
        console.print("Collectives: none.")
        return
    exposed = sum(each["exposed_seconds"] for each in estimate.collectives)
    hidden = sum(each["seconds"] for each in estimate.collectives) - exposed
    kinds = Counter(f"{x['op']}{' in a loop' * x['in_loop']}" for x in estimate.collectives)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(
        f"Collectives: {1e3 * exposed:.1f} ms exposed, {1e3 * hidden:.1f} ms hidden; {listed}."
    )


def _show_data(console: Console, plan: RunPlan) -> None:
    if not plan.workloads:
        console.print("Data: not given (--lengths); every position is taken to bear loss.")
        return
    table = Table("rows", "samples", "tokens", "steps", "padding", "loss", "hours", title="Data")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, work in plan.workloads.items():
        hours = "–"
        if plan.estimate.fits:
            hours = f"{work.num_steps * plan.seconds_at(work.loss_share) / 3600:.2f}"
        table.add_row(
            f"{work.num_rows:,} {name}{' (this run)' if name == plan.packing else ''}",
            f"{work.num_samples:,}",
            f"{work.num_tokens:,}",
            f"{work.num_steps:,}",
            f"{work.padding_share:.1%}",
            f"{work.loss_share:.1%}",
            hours,
        )
    console.print(table)


def _show_basis(console: Console, estimate: StepEstimate, from_cache: bool) -> None:
    """What the estimate rests on and leaves out."""
    kinds = Counter(op.split()[0] for op in estimate.unpriced)
    listed = ", ".join(f"{count} {opcode}" for opcode, count in kinds.most_common()) or "none"
    console.print(f"Ops without a price: {listed}.")
    if estimate.assumptions:
        console.print(f"Assumed: {'; '.join(estimate.assumptions)}.")
    console.print(
        f"This is an estimate by {estimate.compiler}, nothing was run. {CALIBRATION} Compiling, "
        "evaluation and checkpoints are not in it."
    )
    options = estimate.compiler_options or "XLA's defaults"
    made = f"{'from cache, ' * from_cache}compiled in {estimate.compile_seconds:.0f} s"
    console.print(f"Program {estimate.program_hash}, compiler options: {options}; {made}.")


def show_search(
    console: Console, ranked: list[tuple[Setting, StepEstimate | str]], own: Setting
) -> None:
    """Settings by speed; a text says why one has no estimate."""
    table = Table(
        *("", "micro-batches", "row length", "remat", "tokens/s", "s a step", "HBM, GiB", ""),
        title="Settings with the same tokens a step, by speed",
    )
    for column in table.columns[4:7]:
        column.justify = "right"
    for setting, found in ranked:
        mark = "this config" if setting == own else ""
        options = (str(setting.accumulation_steps), str(setting.row_length), setting.remat)
        if isinstance(found, str):
            table.add_row(mark, *options, "–", "–", "–", found)
        elif not found.fits:
            table.add_row(mark, *options, "–", "–", "–", f"does not fit: {found.misfit}")
        else:
            speed = f"{found.tokens_per_s:,.0f}", f"{found.seconds:.3f}"
            table.add_row(mark, *options, *speed, f"{found.hbm_total_gib:.2f}")
    console.print(table)


def describe_setting(setting: Setting, config: TrainConfig) -> str:
    """The options that give `config` this setting."""
    changed = setting.applied_to(config)
    options = (
        f"--gradient_accumulation_steps {setting.accumulation_steps} --model.remat {setting.remat}"
    )
    if changed.data.max_length == config.data.max_length:
        return options
    return (
        f"{options} --data.max_length {setting.row_length} "
        f"--global_batch_size {changed.global_batch_size}"
    )
