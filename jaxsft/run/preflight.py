"""The check before a run: is the step right on this machine, how fast is it, does it fit?

The steps are the run's own compiled program on its own rows, on a copy of adapter and moments that
is thrown away: with and without them a run is the same bit for bit.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft.common.hosts import from_first
from jaxsft.config import TrainConfig
from jaxsft.gemma.sharding import CHIP_NAMES
from jaxsft.run.agreement import StepDifference, compare_ways
from jaxsft.run.setup import Setup
from jaxsft.step.train_step import TrainState, put_batch, train_step

NUM_TIMED_STEPS = 20


class Memory(NamedTuple):
    """Bytes of the device that used most since the process began, loading of the model included."""

    peak: int
    limit: int


class Planned(NamedTuple):
    """What `plan` estimated of a step: seconds, and bytes of HBM on each chip."""

    seconds: float
    hbm_bytes: int


class TimedSteps(NamedTuple):
    """Seconds of the first step, compilation included, and of each that was timed."""

    first_s: float
    seconds: list[float]

    @property
    def median_s(self) -> float:
        """Of the timed steps."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What the preflight found.

    `memory` is None where the device does not count it, `planned` where this machine holds no plan
    of this program, `difference` where there is only one way to compute the step; `not_compared`
    says why.
    """

    program_hash: str
    times: TimedSteps
    tokens_per_s: float
    num_steps_left: int
    budget_hours: float | None
    memory: Memory | None
    planned: Planned | None
    difference: StepDifference | None
    not_compared: str

    @property
    def seconds_per_step(self) -> float:
        """Median of the timed steps."""
        return self.times.median_s

    @property
    def hours(self) -> float:
        """Hours that the remaining steps take, without measurements and checkpoints."""
        return self.num_steps_left * self.seconds_per_step / 3600

    @property
    def problems(self) -> list[str]:
        """Why the run must not start."""
        found, apart = [], self.difference
        if apart is not None and not apart.is_small:
            found.append(
                f"{apart.ways} disagree on this machine: loss by {apart.loss:.1e} (at most "
                f"{apart.loss_bound:.0e}), gradient of {apart.where} by {apart.gradient:.1e} (at "
                f"most {apart.gradient_bound:.0e}); use the versions of JAX and its libraries that "
                "the tests pass with"
            )
        if self.budget_hours is not None and self.hours > self.budget_hours:
            found.append(
                f"{self.num_steps_left:,} steps at {self.seconds_per_step:.3g} s take "
                f"{self.hours:.3g} hours, budget_hours is {self.budget_hours:g}; take fewer steps "
                "or more devices, or raise it"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, units in the names."""
        apart, memory, planned = self.difference, self.memory, self.planned
        return {
            "problems": self.problems,
            "program_hash": self.program_hash,
            "difference": None if apart is None else apart._asdict(),
            "not_compared": self.not_compared,
            "seconds_per_step": self.seconds_per_step,
            "timed_seconds": self.times.seconds,
            "first_step_seconds": self.times.first_s,
            "planned_seconds_per_step": None if planned is None else planned.seconds,
            "planned_hbm_bytes": None if planned is None else planned.hbm_bytes,
            "tokens_per_s": self.tokens_per_s,
            "num_steps_left": self.num_steps_left,
            "hours": self.hours,
            "budget_hours": self.budget_hours,
            "peak_memory_bytes_since_start": None if memory is None else memory.peak,
            "memory_limit_bytes": None if memory is None else memory.limit,
        }


def time_steps(
    setup: Setup, num_steps: int, tick: Callable[[str], None]
) -> tuple[Setup, TrainState, TimedSteps]:
    """Times the run's next steps, after one that compiles, on a copy of its state.

    Returns the new setup, the state after the steps, and their times. The frozen weights of the
    given setup are donated. `tick` is called before each step and may raise.
    """
    spec, batches, first_step = setup.spec, setup.step_batches, int(setup.state.step)
    state, frozen = jax.tree.map(jnp.copy, setup.state), setup.frozen
    seconds = []
    for i in range(1 + num_steps):
        tick(f"timed step {i}")
        rows = batches[(first_step + i) % len(batches)]
        started = time.perf_counter()
        state, frozen, scalars = train_step(
            state, frozen, put_batch(rows, spec.model.mesh), spec=spec
        )
        jax.device_get(scalars)
        seconds.append(time.perf_counter() - started)
    first_s, *others = from_first(lambda: seconds)  # so that all processes judge alike
    return dataclasses.replace(setup, frozen=frozen), state, TimedSteps(first_s, others)


def run_preflight(
    config: TrainConfig, setup: Setup, plan_dir: Path, tick: Callable[[str], None]
) -> tuple[Setup, Preflight]:
    """Times the step and compares it with another way to compute it.

    Returns the new setup and what was found. The frozen weights of the given setup are donated.
    `plan_dir` is where `plan` keeps its estimates. `tick` as in `time_steps`.
    """
    spec, batches, first_step = setup.spec, setup.step_batches, int(setup.state.step)
    setup, state, times = time_steps(setup, NUM_TIMED_STEPS, tick)
    timed = [batches[(first_step + 1 + i) % len(batches)] for i in range(NUM_TIMED_STEPS)]
    num_tokens = sum(int((batch.segment_ids_BT > 0).sum()) for batch in timed)
    memory = peak_memory(spec.model.mesh)
    tick("comparing two ways to compute the step")
    batch = put_batch(timed[-1], spec.model.mesh)
    # The trained copy of the adapter: a fresh one's B is zero.
    setup, difference, not_compared = compare_ways(config, setup, state.adapter, batch)
    return setup, Preflight(
        program_hash=setup.program_hash,
        times=times,
        tokens_per_s=num_tokens * jax.process_count() / sum(times.seconds),
        num_steps_left=len(batches) - first_step,
        budget_hours=config.budget_hours,
        memory=memory,
        planned=find_plan(plan_dir, setup.program_hash, spec.model.mesh),
        difference=difference,
        not_compared=not_compared,
    )


def peak_memory(mesh: Mesh) -> Memory | None:
    """Memory of this process's fullest device; None where devices do not count it, as CPUs."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    known = [
        Memory(each["peak_bytes_in_use"], each["bytes_limit"])
        for each in stats
        if each and {"peak_bytes_in_use", "bytes_limit"} <= each.keys()
    ]
    return max(known, default=None)


def find_plan(plan_dir: Path, program_hash: str, mesh: Mesh) -> Planned | None:
    """The newest plan in `plan_dir` for this program on the same number of the same chips."""
    chip = CHIP_NAMES.get(mesh.devices.flat[0].device_kind)
    paths = plan_dir.glob(f"{program_hash}-*.json")
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            is_same = (plan["topology"].split(":")[0], plan["num_chips"]) == (chip, mesh.size)
            planned = Planned(float(plan["seconds"]), int(sum(plan["hbm_bytes"].values())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # damaged, or of another version
        if is_same and planned.seconds > 0:
            return planned
    return None
