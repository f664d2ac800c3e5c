"""Acceptance: does single_session, 22,500 steps of 65,536 tokens, take at most 7 hours on a v5e-8?

`python -m benchmarks.step_time [--budget-hours 7] [--json FILE] [OPTIONS of jaxsft.plan]` compiles
the step with XLA's TPU compiler and prices it: an estimate, no TPU needed. Further:

--peer tunix   the same for Tunix's own step: ours, theirs and the ratio in one table
--scaling      a Markdown table over larger slices (the batch grows with them) and other models
--measure      on a machine with an accelerator: the same step with random weights, timed

On the recipe's own work and slice the bounds of `acceptance` are checked as well, and those that do
not hold are named.

Exit codes: 0 within the budget and the bounds; 1 beyond one, the step does not fit, or the compiler
failed; 2 bad input.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.acceptance import BOUNDS, TOPOLOGY, violations, work_differences
from benchmarks.frozen_step import estimate_frozen
from benchmarks.real_step import random_steps
from benchmarks.step_tables import compare_with_tunix, show_scaling
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail, parse_config, parse_options
from jaxsft.common.files import write_json
from jaxsft.config import TrainConfig
from jaxsft.gemma.sharding import CHIP_NAMES
from jaxsft.plan.chips import CHIPS, TOPOLOGIES, num_chips
from jaxsft.plan.command import make_plan, prepare_compiler
from jaxsft.plan.options import LOCAL, PlanOptions, check_plan_options, gives_budget
from jaxsft.plan.report import show_plan
from jaxsft.plan.run_plan import RunPlan, model_flops
from jaxsft.plan.tpu_aot import AOT_ENVIRONMENT, CompilerError
from jaxsft.weights.find import architecture

DESCRIPTION = (
    "Estimates, or with --measure times, the train step; --peer tunix and --scaling print tables. "
    "Further options are those of jaxsft.plan."
)
RECIPE = "single_session"
BUDGET_HOURS = 7.0
NUM_WARMUP_STEPS, NUM_TIMED_STEPS = 3, 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    # Logs have room, whatever the terminal has.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        mode, rest = parse_mode(arguments)
        config, options = parse_options(
            *("benchmarks.step_time", DESCRIPTION, rest),
            *(TrainConfig, PlanOptions),
            default_recipe=RECIPE,
        )
        check_plan_options(options, rest)
        check_options(mode, options, rest)
        if not gives_budget(rest):
            config = dataclasses.replace(config, budget_hours=BUDGET_HOURS)
        jax.config.update("jax_default_matmul_precision", "highest")  # as train does
        if mode == "measure":
            values, code = measure(config, options, arguments, console), 0
        else:
            prepare_compiler()
            if mode == "scaling":
                values, code = {"scaling": show_scaling(config, console)}, 0
            else:
                values, code = accept(config, options, console, is_peer=mode == "tunix")
        if options.json:
            write_json(Path(options.json), values)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    except CompilerError as error:
        return fail(error, EXIT_FAILED)
    return code


def parse_mode(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(estimate, measure, scaling or tunix, the other arguments); ValueError in one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--peer", choices=["tunix"])
    for name in ("measure", "scaling"):
        parser.add_argument(f"--{name}", action="store_true")
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    modes = [name for name in ("measure", "scaling") if getattr(found, name)]
    modes += [found.peer] if found.peer else []
    if len(modes) > 1:
        raise ValueError("--measure, --scaling and --peer are runs of their own; choose one")
    return modes[0] if modes else "estimate", rest


def check_options(mode: str, options: PlanOptions, rest: Sequence[str]) -> None:
    """ValueError for options of jaxsft.plan that the benchmark, or this mode, would ignore."""
    given = {
        "--search": options.search,
        "--plot": options.plot is not None,
        f"--topology {LOCAL}": options.topology == LOCAL,
    }
    if mode == "scaling":
        given |= {
            "--topology": options.topology != PlanOptions().topology,
            "--lengths": options.lengths is not None,
            "--budget-hours": gives_budget(rest),
        }
    if ignored := [name for name, is_given in given.items() if is_given]:
        which = "--scaling, which has slices of its own," if mode == "scaling" else "this benchmark"
        raise ValueError(f"{which} does nothing with {' and '.join(ignored)}: leave it out")


def accept(
    config: TrainConfig, options: PlanOptions, console: Console, *, is_peer: bool
) -> tuple[dict[str, Any], int]:
    """(the plan as data, exit code), beside Tunix's step where `is_peer`."""
    others = work_differences(config, parse_config("benchmarks.step_time", "", [], RECIPE)[0])
    if is_peer:
        check_peer(others, options.topology)
    plan, from_cache = make_plan(config, options, console)
    values: dict[str, Any] = plan.as_dict()
    if is_peer:
        values["tunix"] = compare_with_tunix(plan, console)
        return values, EXIT_FAILED if violations(plan, None, is_recipe=False) else 0
    show_plan(console, plan, from_cache=from_cache)
    values |= show_overhead(plan, console)
    is_recipe = not others and options.topology == TOPOLOGY
    values["violated"] = violations(plan, values["lora_overhead"], is_recipe=is_recipe)
    if values["violated"]:
        console.print(f"NOT ACCEPTED: {'; '.join(values['violated'])}.")
    elif is_recipe:
        console.print(f"Accepted: at most {', '.join(text.format(b) for b, text in BOUNDS)}.")
    return values, EXIT_FAILED if values["violated"] else 0


def check_peer(others: Sequence[str], topology: str) -> None:
    """ValueError where Tunix's step, which is the recipe's on 8 chips, would be other work."""
    if others:
        raise ValueError(
            f"--peer tunix compares the work of {RECIPE} alone: leave out {', '.join(others)}"
        )
    if not topology.endswith(":2x4"):
        valid = ", ".join(each for each in TOPOLOGIES if each.endswith(":2x4"))
        raise ValueError(f"--peer tunix is for 8 chips: --topology {topology} is not {valid}")


def show_overhead(plan: RunPlan, console: Console) -> dict[str, Any]:
    """What the adapters cost: the step beside the same without them, by part; None where there is
    no such step, or one of them does not fit."""
    unknown = {"lora_overhead": None, "frozen_seconds_per_step": None, "lora_overhead_parts": None}
    if not plan.estimate.fits:
        return unknown
    if plan.formulation != "fused":
        console.print("LoRA overhead: that of the fused step alone is estimated.")
        return unknown
    ours, frozen = plan.estimate, estimate_frozen(plan, console)
    if not frozen.fits:
        console.print(f"LoRA overhead: the step without adapters does not fit, {frozen.misfit}.")
        return unknown
    more = {part: seconds - frozen.parts[part] for part, seconds in ours.parts.items()}
    largest = sorted(more.items(), key=lambda item: -abs(item[1]))[:4]
    overhead = ours.seconds / frozen.seconds - 1
    console.print(
        f"LoRA overhead {overhead:.1%}: without adapters, forward and activation gradients alone, "
        f"the step takes {frozen.seconds:.3f} s; the difference by part, ms: "
        f"{', '.join(f'{part} {1e3 * seconds:+.1f}' for part, seconds in largest)}."
    )
    return {
        "lora_overhead": overhead,
        "frozen_seconds_per_step": frozen.seconds,
        "lora_overhead_parts": more,
    }


def measure(
    config: TrainConfig, options: PlanOptions, arguments: list[str], console: Console
) -> dict[str, Any]:
    """Times the step on this machine's devices; on a TPU, beside the estimate."""
    if jax.default_backend() == "cpu":
        raise ValueError("--measure needs an accelerator and JAX finds none: leave it out")
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    seconds = time_steps(config)
    median = statistics.median(seconds)
    console.print(
        f"{config.name} on {count} × {kind}: {median:.4f} s a step, median of {len(seconds)} "
        f"({min(seconds):.4f} to {max(seconds):.4f} s)"
    )
    values: dict[str, Any] = {
        "device": kind,
        "num_devices": count,
        "measured_seconds_per_step": median,
        "seconds": seconds,
    }
    chip = CHIP_NAMES.get(kind)
    if chip is None:
        console.print("MFU and estimate are for TPU v5e and v6e.")
        return values
    flops = model_flops(config, architecture(config.model.path)[0]).base
    values["lora_mfu"] = flops / (median * count * CHIPS[chip].peak_flops)
    console.print(f"LoRA-MFU {values['lora_mfu']:.1%}")
    if (chip, count) != (options.topology.split(":")[0], num_chips(options.topology)):
        console.print(f"These devices are not {options.topology}: no estimate to compare with.")
        return values
    estimate = estimate_apart([each for each in arguments if each != "--measure"])
    estimated = estimate["estimated_seconds_per_step"]
    values |= {
        "estimated_seconds_per_step": estimated,
        "measured_over_estimated": median / estimated,
    }
    console.print(
        f"The estimate is {estimated:.4f} s: measured / estimated {median / estimated:.3f}"
    )
    return values


def time_steps(config: TrainConfig) -> list[float]:
    """Seconds of each timed step, after the first ones."""
    _, steps = random_steps(config)
    for _ in range(NUM_WARMUP_STEPS):
        next(steps)
    seconds = []
    for _ in range(NUM_TIMED_STEPS):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return seconds


def estimate_apart(arguments: list[str]) -> dict[str, Any]:
    """This benchmark's estimate from a process of its own: this one holds the devices."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "estimate.json"
        command = [sys.executable, "-m", "benchmarks.step_time", *arguments, "--json", str(path)]
        environment = {**os.environ, **AOT_ENVIRONMENT}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, EXIT_FAILED) or not path.exists():
            raise ValueError(f"no estimate: {result.stderr.strip()[-300:]}")
        estimate: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return estimate


if __name__ == "__main__":
    sys.exit(main())
