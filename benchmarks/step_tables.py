"""Tables of the step's estimate, in Markdown: beside Tunix's step, and over larger slices."""

import dataclasses
from typing import Any

from rich.console import Console

from benchmarks.tunix_step import tunix_prices
from jaxsft.config import TrainConfig
from jaxsft.plan.chips import GIB, num_chips
from jaxsft.plan.command import PlanOptions, make_plan
from jaxsft.plan.run_plan import RunPlan

SCALING = ("v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
OTHER_MODELS = ("google/gemma-2b", "google/gemma-3-1b-it")


def compare_with_tunix(plan: RunPlan, console: Console) -> dict[str, Any]:
    """Ours, Tunix's with and without its remat, and the ratios: shown, and by name."""
    estimate = plan.estimate
    console.print(f"| {estimate.topology}, estimates | s a step | GiB a chip | of ours |")
    console.print("|---|---|---|---|")
    ours = f"{estimate.seconds:.3f} | {estimate.hbm_total_gib:.1f}" if estimate.fits else "– | –"
    console.print(f"| jaxsft, {plan.config.name} | {ours} | |")
    values: dict[str, dict[str, Any]] = {}
    for name, remat in (("without remat", False), ("with its remat", True)):
        step = tunix_prices(estimate.topology, remat)
        seconds, gib = step.priced.seconds, step.memory.total / GIB
        ratio = seconds / estimate.seconds if estimate.fits else None
        shown = "–" if ratio is None else f"{ratio:.2f} ×"
        console.print(f"| Tunix, 4 × 8 rows, {name} | {seconds:.3f} | {gib:.1f} | {shown} |")
        values[name] = {
            "estimated_seconds_per_step": seconds,
            "hbm_gib_per_chip": gib,
            "over_ours": ratio,
            "parts": step.priced.parts,
            "assumptions": [f"one iteration of {loop}" for loop in step.priced.unknown_loops],
            "unpriced": [f"{op.opcode} {op.name}" for op in step.priced.unpriced],
        }
    for name, of_tunix in values.items():
        if of_tunix["assumptions"]:
            console.print(f"Assumed of Tunix's step {name}: {'; '.join(of_tunix['assumptions'])}.")
    return values


def show_scaling(config: TrainConfig, console: Console) -> list[dict[str, Any]]:
    """Weak scaling, with as many rows a chip as the config has on the first slice, and other
    models on that slice: shown, and as data."""
    console.print(
        "| model | slice | rows a step | s a step | tokens/s | LoRA-MFU "
        "| collectives, ms exposed | ms hidden | GiB a chip |"
    )
    console.print("|---|---|---|---|---|---|---|---|---|")
    runs = [(topology, config.model.path) for topology in SCALING]
    runs += [(SCALING[0], path) for path in OTHER_MODELS]
    rows = []
    for topology, path in runs:
        num_rows = config.global_batch_size * num_chips(topology) // num_chips(SCALING[0])
        scaled = dataclasses.replace(
            config,
            global_batch_size=num_rows,
            model=dataclasses.replace(config.model, path=path),
        )
        plan, _ = make_plan(scaled, PlanOptions(topology=topology), console)
        cells = [plan.model_config.name, topology, str(num_rows), *_cells(plan)]
        console.print(f"| {' | '.join(cells)} |")
        rows.append({"model": plan.model_config.name} | plan.as_dict())
    return rows


def _cells(plan: RunPlan) -> list[str]:
    estimate = plan.estimate
    if not estimate.fits:
        return ["–"] * 5 + [f"does not fit: {estimate.misfit}"]
    exposed = sum(each["exposed_seconds"] for each in estimate.collectives)
    hidden = sum(each["seconds"] for each in estimate.collectives) - exposed
    return [
        f"{estimate.seconds:.3f}",
        f"{estimate.tokens_per_s:,.0f}",
        f"{plan.lora_mfu:.0%}",
        f"{1e3 * exposed:.1f}",
        f"{1e3 * hidden:.1f}",
        f"{estimate.hbm_total_gib:.1f}",
    ]
