"""Plans a run: for a TPU that need not be there, or for the devices of this machine."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxsft.cli import EXIT_FAILED, fail
from jaxsft.common.console import make_console
from jaxsft.common.files import cache_dir, write_json
from jaxsft.config import TrainConfig
from jaxsft.config_check import check_devices
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.plan.chips import num_chips
from jaxsft.plan.estimate import StepEstimate, estimate_step
from jaxsft.plan.local import plan_devices
from jaxsft.plan.options import DATA, LOCAL, PlanOptions
from jaxsft.plan.plot import plot_plan
from jaxsft.plan.report import NOTHING_FITS, describe_setting, show_plan, show_search
from jaxsft.plan.run_plan import RunPlan, count_workloads, steps_without_data
from jaxsft.plan.search import (
    Setting,
    all_settings,
    nearest_fit,
    setting_of,
    try_settings,
)
from jaxsft.plan.tpu_aot import AOT_ENVIRONMENT, CompilerError
from jaxsft.plan.workload import Workload, read_lengths
from jaxsft.prepare.rows import load_data, run_model
from jaxsft.run.fork import with_fork
from jaxsft.weights.find import architecture, open_tokenizer

EXIT_DOES_NOT_FIT = 1


def plan_run(config: TrainConfig, options: PlanOptions, typed: frozenset[str] = frozenset()) -> int:
    """Plans a run; returns the exit code. ValueError and OSError are bad input.

    `typed` are the options that the user gave: an adapter to fork from gives the others, where it
    is on this machine.
    """
    if config.fork_from is not None and Path(config.fork_from).exists():
        config, _ = with_fork(config, typed)
    try:
        return _plan(config, options)
    except CompilerError as error:
        return fail(error, EXIT_FAILED)


def _plan(config: TrainConfig, options: PlanOptions) -> int:
    console = make_console(log_width=120)
    lora.resolve_targets(config.lora.target_modules)
    # As train does: the default on accelerators is bfloat16 passes for float32 matmuls.
    jax.config.update("jax_default_matmul_precision", "highest")
    if options.topology == LOCAL:
        return plan_local(config, options, console)
    prepare_compiler()
    plan, from_cache = make_plan(config, options, console)
    show_plan(console, plan, from_cache=from_cache)
    values = plan.as_dict()
    if not plan.estimate.fits:
        values["nearest"] = show_way_out(plan, console)
    if options.search:
        values["search"] = search(plan, console)
    if options.plot:
        plot_plan(plan, Path(options.plot))
    if options.json:
        write_json(Path(options.json), values)
    return EXIT_DOES_NOT_FIT if plan.is_over_budget or not plan.estimate.fits else 0


def prepare_compiler() -> None:
    """Sets what the TPU compiler reads when it is loaded; ValueError when it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install 'jaxsft[plan]'")
    os.environ.update(AOT_ENVIRONMENT)
    jax.config.update("jax_platforms", AOT_ENVIRONMENT["JAX_PLATFORMS"])


def make_plan(config: TrainConfig, options: PlanOptions, console: Console) -> tuple[RunPlan, bool]:
    """(the plan, does it come from the cache)."""
    topology = options.topology
    check_devices(config, num_chips(topology))
    model_config, source = architecture(config.model.path)
    workloads = read_workloads(config, options)
    steps = num_plan_steps(config, workloads)
    if steps is None and config.budget_hours is not None:
        raise ValueError("budget_hours needs the number of steps: give --lengths or --max_steps")
    estimate, from_cache = estimate_config(config, model_config, topology, steps, console)
    is_exact = config.max_steps is not None or options.lengths == DATA
    plan = RunPlan(config, model_config, source, estimate, steps, workloads, is_exact)
    return plan, from_cache


def estimate_config(
    config: TrainConfig,
    model_config: GemmaConfig,
    topology: str,
    steps: int | None,
    console: Console,
) -> tuple[StepEstimate, bool]:
    """The step's estimate and whether it was kept. Any number of steps takes the same time."""
    with console.status(
        f"Compiling for {topology}: {describe_setting(setting_of(config), config)} …"
    ):
        return estimate_step(
            config,
            model_config,
            topology,
            steps or config.warmup_steps + 1,
            cache_dir=cache_dir("plan"),
            environment=os.environ,
        )


def read_workloads(config: TrainConfig, options: PlanOptions) -> dict[str, Workload]:
    """Packed and unpacked, from --lengths; {} without either."""
    if options.lengths == DATA:
        tokenizer = open_tokenizer(run_model(config.model).tokenizer)
        rows = load_data(config.data, tokenizer, may_download=False).train.rows
        lengths = np.diff(rows.sample_offsets)[np.sort(rows.row_samples)].tolist()
        return count_workloads(config, lengths, rows.num_loss_tokens)
    if options.lengths is not None:
        return count_workloads(config, read_lengths(options.lengths))
    return {}


def num_plan_steps(config: TrainConfig, workloads: dict[str, Workload]) -> int | None:
    """Steps of the run, where config or data tell; ValueError when the warm-up is not shorter."""
    steps = steps_without_data(config)
    if workloads:
        steps = next(iter(workloads.values())).num_steps
    if steps is not None and config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} is not below the run's {steps} steps")
    return steps


def show_way_out(plan: RunPlan, console: Console) -> dict[str, Any] | None:
    """Compiles settings that take less HBM, the nearest first, until one fits; shows it.

    Where on-chip memory is too small none of them helps; what does is shown.
    """
    if not plan.estimate.hbm_bytes:
        console.print(
            "That is the chip's on-chip memory, which holds the blocks that a kernel works on: use "
            "a lower data.max_length, or --step plain, which has no such kernels. Neither more "
            "chips nor more micro-batches help."
        )
        return None
    nearest = nearest_fit(plan.config, plan.estimate.num_chips, setting_estimator(plan, console))
    if nearest is None:
        console.print(NOTHING_FITS)
        return None
    setting, found = nearest
    options = describe_setting(setting, plan.config)
    console.print(
        f"The nearest setting that fits: {options} ({found.seconds:.3f} s a step, "
        f"{found.hbm_total_gib:.2f} GiB a chip)."
    )
    values = setting._asdict() | {"options": options, "gib": found.hbm_total_gib}
    return values | {"estimated_seconds_per_step": found.seconds}


def search(plan: RunPlan, console: Console) -> list[dict[str, Any]]:
    """Estimates the settings around the config's own and shows them, the fastest first."""
    config, estimate = plan.config, plan.estimate
    candidates = all_settings(config, estimate.num_chips, plan.model_config.max_positions)
    tried = list(try_settings(candidates, setting_estimator(plan, console)))

    def tokens_per_s(found: StepEstimate | str) -> float:
        return found.tokens_per_s if isinstance(found, StepEstimate) else 0.0

    ranked = sorted(tried, key=lambda each: -tokens_per_s(each[1]))
    show_search(console, ranked, setting_of(config))
    results = []
    for setting, found in ranked:
        result: dict[str, Any] = setting._asdict() | {"fits": False}
        if isinstance(found, StepEstimate):
            result |= {"fits": found.fits, "tokens_per_s": found.tokens_per_s}
            result["hbm_gib_per_chip"] = found.hbm_total_gib
        results.append(result)
    return results


def setting_estimator(plan: RunPlan, console: Console) -> Callable[[Setting], StepEstimate]:
    """Setting -> the estimate of the plan's config under it."""

    def estimate(setting: Setting) -> StepEstimate:
        config, topology = setting.applied_to(plan.config), plan.estimate.topology
        found, was_kept = estimate_config(config, plan.model_config, topology, plan.steps, console)
        if not was_kept:
            result = found.misfit or f"{found.seconds:.3f} s"
            console.print(f"{describe_setting(setting, plan.config)}: {result}")
        return found

    return estimate


def plan_local(config: TrainConfig, options: PlanOptions, console: Console) -> int:
    """Plans for the devices of this machine; returns the command's exit code."""
    check_devices(config, jax.device_count())
    steps = num_plan_steps(config, read_workloads(config, options))
    is_exact = config.max_steps is not None or options.lengths == DATA
    values = plan_devices(config, steps, steps_are_exact=is_exact, console=console)
    if options.json:
        write_json(Path(options.json), {"topology": LOCAL} | values)
    return 0 if values["fits"] else EXIT_DOES_NOT_FIT
