"""Compares a run's schedule with the time left: warns, or shortens the schedule on request."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from jaxsft.common.files import write_json
from jaxsft.common.hosts import from_first
from jaxsft.config import RunConfig
from jaxsft.run.preflight import TimedSteps
from jaxsft.run.session import Session, SessionEnd, duration
from jaxsft.run.setup import Setup, with_num_steps

SCHEDULE = "schedule.json"  # in the run's directory, so that the run goes on as it began
_SLOWER = 1.03  # than the timed steps, with saving and logging


def fitted(config: RunConfig, setup: Setup, run_dir: Path) -> Setup:
    """`setup` with the number of steps that its run was shortened to when it began, if it was."""
    path = run_dir / SCHEDULE
    if not path.exists():
        return setup
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["num_steps"]
        assert isinstance(steps, int) and steps > config.warmup_steps
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise ValueError(
            f'{path}: damaged; write {{"num_steps": N}} into it with the run\'s number of steps'
        ) from error
    return setup if steps == len(setup.step_batches) else with_num_steps(setup, config, steps)


def check_fit(config: RunConfig, run_dir: Path, end: SessionEnd) -> None:
    """ValueError for fit_deadline without a deadline, unless the schedule was fitted before."""
    if config.fit_deadline and math.isinf(end.at_s) and not (run_dir / SCHEDULE).exists():
        raise ValueError("fit_deadline needs a deadline or max_seconds")


def fit_schedule(
    config: RunConfig,
    setup: Setup,
    run_dir: Path,
    session: Session,
    timed: TimedSteps | None,
    time_steps: Callable[[Setup], tuple[Setup, TimedSteps]],
) -> tuple[Setup, str]:
    """Shortens the schedule to what fits; returns the new setup and a line for the user.

    The given setup is donated. Call it when only the steps and the last measurement are left to do.
    The number of steps is kept in `run_dir`. Without `timed`, `time_steps` times some. Raises
    ValueError when not even the warm-up fits, StopNow when the run has to stop.
    """
    asked = len(setup.step_batches)
    if int(setup.state.step) > 0:
        raise ValueError(
            f"fit_deadline: {run_dir} was begun without it, with {asked:,} steps, and a schedule "
            "can't change on the way; leave it out, or start a new run from its adapter: "
            f"--fork-from {run_dir} and another --name"
        )
    if timed is None:
        setup, timed = time_steps(setup)
    seconds_per_step = timed.median_s
    # A shorter schedule is another program, to be compiled like the first; 2 steps as in reserve_s.
    left_s = session.left_s() - session.reserve_s - session.measure_s
    left_s -= timed.first_s + 2 * max(timed.seconds)
    fitting = math.floor(left_s / (seconds_per_step * _SLOWER + _measuring_s(config, session)))
    steps = from_first(lambda: min(asked, fitting))  # clocks differ
    at = f"{seconds_per_step:.3g} s a step"
    if steps <= config.warmup_steps:
        raise ValueError(
            f"fit_deadline: {max(steps, 0):,} steps fit at {at}, no more than the "
            f"{config.warmup_steps:,} of the warm-up; give the session more time or lower "
            "warmup_steps"
        )
    write_json(run_dir / SCHEDULE, {"num_steps": steps})
    if steps == asked:
        return setup, f"All {asked:,} steps fit at {at}."
    setup = with_num_steps(setup, config, steps)
    return setup, f"At {at} {steps:,} of {asked:,} steps fit: the schedule is shortened to them."


def forecast(
    config: RunConfig, setup: Setup, step: int, session: Session, seconds_per_step: float
) -> str | None:
    """A line for the user when the session ends before the steps after `step` are done."""
    last_step = len(setup.step_batches)
    seconds_per_step += _measuring_s(config, session)
    needed_s = (last_step - step) * seconds_per_step + session.measure_s
    left_s = session.left_s() - session.reserve_s
    if needed_s <= left_s:
        return None
    reached = min(step + max(math.floor(left_s / seconds_per_step), 0), last_step)
    return (
        f"WARNING: the {last_step - step:,} steps left take {duration(needed_s)} at "
        f"{seconds_per_step:.3g} s each, the session has {duration(session.left_s())}: it will "
        f"stop at about step {reached:,} of {last_step:,}, to be continued in another session. "
        "A new run with --fit-deadline shortens its schedule to what fits."
    )


def _measuring_s(config: RunConfig, session: Session) -> float:
    """Seconds of a measurement on the way, spread over the steps between two of them."""
    return session.measure_s / config.eval_steps if config.eval_steps else 0.0
