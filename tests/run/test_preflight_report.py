"""The preflight's arithmetic and its verdict, by hand; the plan that it finds; memory."""

import dataclasses
import io
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jaxsft.common.files import write_json
from jaxsft.plan.estimate import StepEstimate
from jaxsft.run.agreement import StepDifference
from jaxsft.run.preflight import Memory, Planned, Preflight, TimedSteps, find_plan, peak_memory
from jaxsft.run.report import show_preflight

GIB = 2**30
# 1800 steps at a median of 2 s: one hour.
GOOD = Preflight(
    program_hash="0123456789abcdef",
    times=TimedSteps(300.0, [2.0, 1.0, 90.0]),
    tokens_per_s=1234.0,
    num_steps_left=1800,
    budget_hours=1.0,
    memory=Memory(3 * GIB, 4 * GIB),
    planned=Planned(1.6, GIB // 2),
    difference=StepDifference("Pallas kernels and XLA", 1e-3, 0.05, "global qkv_b", 1e-3, 0.1),
    not_compared="",
)


def test_hours_are_those_of_the_median_step() -> None:
    assert GOOD.seconds_per_step == 2.0
    assert GOOD.hours == 1.0
    assert GOOD.problems == []  # exactly at the budget and at the loss's bound


def test_over_the_budget() -> None:
    (problem,) = dataclasses.replace(GOOD, budget_hours=0.9).problems
    assert problem.startswith("1,800 steps at 2 s take 1 hours, budget_hours is 0.9; ")
    assert dataclasses.replace(GOOD, budget_hours=None).problems == []


@pytest.mark.parametrize(
    ("loss", "gradient"), [(2e-3, 0.05), (1e-3, 0.11), (math.nan, 0.0), (0.0, math.nan)]
)
def test_disagreement(loss: float, gradient: float) -> None:
    assert GOOD.difference is not None
    apart = GOOD.difference._replace(loss=loss, gradient=gradient)
    (problem,) = dataclasses.replace(GOOD, difference=apart).problems
    assert problem.startswith(
        f"Pallas kernels and XLA disagree on this machine: loss by {loss:.1e}"
    )
    assert "gradient of global qkv_b by" in problem and "\n" not in problem


def test_report_in_one_block() -> None:
    out = io.StringIO()
    show_preflight(Console(file=out, width=200), GOOD)
    assert out.getvalue().splitlines() == [
        "  correct  Pallas kernels and XLA agree: loss 1.0e-03 apart (at most 1e-03), gradients "
        "5.0e-02 (global qkv_b; at most 1e-01)",
        "  speed    2.000 s a step (median of 3, 1.000 to 90.000), 1,234 tokens/s; 1.25 × the "
        "planned 1.600 s",
        "  time     1,800 steps take 1 hours; budget_hours 1",
        "  memory   3.00 of 4.00 GiB on the fullest device since the start, loading included; the "
        "step alone is planned at 0.50",
        "  program  0123456789abcdef",
    ]


def test_report_without_a_plan_says_how_to_make_one() -> None:
    out = io.StringIO()
    show_preflight(Console(file=out, width=200), dataclasses.replace(GOOD, planned=None))
    assert "no plan of it was made on this machine: python -m jaxsft.plan" in out.getvalue()
    assert out.getvalue().splitlines()[3].endswith("loading included")


def kept_estimate(**changes: Any) -> dict[str, Any]:
    """As `plan` writes it."""
    estimate = StepEstimate(
        topology="v5e:2x4",
        num_chips=8,
        program_hash=GOOD.program_hash,
        compiler_options={},
        compiler="libtpu",
        compile_seconds=60.0,
        num_positions=65536,
        misfit="",
        hbm_bytes={"weights": 5 * GIB, "temporaries": GIB},
        hbm_limit_bytes=16 * GIB,
        seconds=0.7,
    )
    return dataclasses.asdict(dataclasses.replace(estimate, **changes))


def mesh(device_kind: str, num_devices: int, stats: Any = None) -> Any:
    devices = [SimpleNamespace(device_kind=device_kind, memory_stats=lambda: stats)]
    devices *= num_devices
    return SimpleNamespace(
        devices=SimpleNamespace(flat=devices), size=num_devices, local_devices=devices
    )


def test_the_newest_plan_of_the_same_program_and_machine(tmp_path: Path) -> None:
    plans = {
        "old": kept_estimate(seconds=0.9),
        "new": kept_estimate(),
        "other_chip": kept_estimate(topology="v6e:2x4", seconds=0.3),
        "other_size": kept_estimate(topology="v5e:4x4", num_chips=16, seconds=0.4),
        "does_not_fit": kept_estimate(misfit="20 of 15.75 GiB of HBM", seconds=0.0),
    }
    for age, (name, plan) in enumerate(plans.items()):
        path = tmp_path / f"{GOOD.program_hash}-{name}.json"
        write_json(path, plan)
        os.utime(path, (age, age))
    (tmp_path / f"{GOOD.program_hash}-damaged.json").write_text("{")

    def find(program: str, device_kind: str, num_devices: int) -> Planned | None:
        return find_plan(tmp_path, program, mesh(device_kind, num_devices))

    assert find(GOOD.program_hash, "TPU v5 lite", 8) == Planned(0.7, 6 * GIB)
    assert find(GOOD.program_hash, "TPU v6 lite", 8) == Planned(0.3, 6 * GIB)
    assert find(GOOD.program_hash, "TPU v5 lite", 4) is None
    assert find(GOOD.program_hash, "cpu", 8) is None
    assert find("another", "TPU v5 lite", 8) is None
    assert find_plan(tmp_path / "none", GOOD.program_hash, mesh("TPU v5 lite", 8)) is None


def test_memory_where_the_device_counts_it() -> None:
    assert peak_memory(mesh("cpu", 2)) is None
    assert peak_memory(mesh("TPU v5 lite", 1, {"bytes_in_use": 1})) is None
    stats = {"peak_bytes_in_use": 5, "bytes_limit": 9}
    assert peak_memory(mesh("TPU v5 lite", 2, stats)) == Memory(5, 9)
