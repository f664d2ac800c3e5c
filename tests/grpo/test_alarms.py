"""Warnings of a training on rewards, by numbers that can be checked by hand."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.config import GrpoConfig
from jaxsft.grpo.alarms import Alarms


def said(name: str, *values: Any, first_step: int = 1, every: int = 1) -> dict[int, str]:
    """The warnings that these values of a metric, step by step, lead to."""
    alarms = Alarms()
    steps = range(first_step, first_step + every * len(values), every)
    found = {
        step: alarms.check(step, {name: value}) for step, value in zip(steps, values, strict=True)
    }
    assert all(len(lines) <= 1 and "\n" not in "".join(lines) for lines in found.values())
    return {step: lines[0] for step, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("name", "values", "step", "number", "option"),
    [
        # (2 * 0.5 + 8 * 0.9) / 10; before step 10 there are no ten steps.
        ("dead_groups", [0.5] * 2 + [0.9] * 10, 10, "82.0%", "rollout.num_generations"),
        # (2 * 0.2 + 3 * 0.4) / 5
        ("truncated", [0.2] * 5 + [0.4] * 5, 8, "32.0%", "rollout.max_new_tokens"),
        ("entropy", [2.0] * 5 + [0.4] * 5, 10, "0.4 nats", "objective.beta"),
        # At step 9 (40 + 4 * 15) / 5 is half of 40, not below it.
        ("reasoning_words", [40] * 5 + [15] * 5, 10, "15.0 words", "reward.min_reasoning_words"),
        # (2 * 0.1 + 3 * 0.9) / 5
        ("kl", [0.1] * 5 + [0.9] * 5, 8, "0.58 nats", "objective.beta"),
    ],
)
def test_a_warning_has_its_number_and_what_to_change(name, values, step, number, option) -> None:
    found = said(name, *values)
    assert list(found) == [step]
    assert number in found[step] and option in found[step]


def test_values_at_their_bounds_are_no_reason_to_warn() -> None:
    assert said("dead_groups", *[0.8] * 30) == {}
    assert said("truncated", *[0.3] * 30) == said("kl", *[0.5] * 30) == {}
    assert said("entropy", *[1.0] * 5, *[0.25] * 30) == {}
    assert said("reasoning_words", *[10] * 5, *[5] * 30) == {}
    assert said("reasoning_words", *[0] * 30) == said("entropy", *[0.0] * 30) == {}


def test_equal_rewards_are_told_after_20_steps_in_a_row() -> None:
    found = said("dead_groups", *[1.0] * 50)
    assert list(found) == [10, 20]
    assert "no group had different rewards for 20 steps" in found[20]
    # One live group of 16 in step 11.
    assert list(said("dead_groups", *[1.0] * 10, 15 / 16, *[1.0] * 30)) == [10, 31]
    # A line for every 10th step only: the second stands for 11 steps, the third for 21.
    assert list(said("dead_groups", *[1.0] * 5, first_step=10, every=10)) == [20, 30]


def test_a_warning_is_said_again_only_after_it_was_over() -> None:
    bad, good = [0.6] * 20, [0.0] * 20
    assert list(said("truncated", *bad, *good, *bad)) == [5, 43]
    wavers = [0.31, 0.29] * 30  # means of 5 are 0.302 and 0.298: over only at 0.27
    assert list(said("truncated", *wavers)) == [5]


def test_what_is_missing_or_not_finite_warns_of_nothing() -> None:
    nothing: list[Any] = [None, math.nan, math.inf, "text"]
    assert said("kl", *nothing * 5) == {}
    assert list(said("kl", 0.6, None, 0.6, math.nan, 0.6, 0.6)) == [5]
    assert Alarms().check(1, {"loss": 3.0}) == []


def test_options_that_warnings_name_exist() -> None:
    alarms, start = Alarms(), {"entropy": 1.0, "reasoning_words": 9.0}
    bad = {"dead_groups": 1.0, "truncated": 1.0, "entropy": 0.1, "reasoning_words": 1.0, "kl": 1.0}
    lines = [line for n in range(40) for line in alarms.check(n, start if n < 5 else bad)]
    named = re.findall(r"[a-z]+\.[a-z_]+|[a-z]+_[a-z]+", " ".join(lines))
    assert len(lines) == 6 and {"learning_rate", "objective.beta"} < {*named}
    for name in {*named} - {"rollouts.jsonl"}:
        functools.reduce(getattr, name.split("."), GrpoConfig())


LINE = st.fixed_dictionaries(
    {},
    optional={
        "dead_groups": st.sampled_from([0.0, 1.0, 1.0, 1.0]),
        "truncated": st.sampled_from([0.0, 0.7]),
        "entropy": st.sampled_from([0.01, 1.0, math.nan]),
        "reasoning_words": st.sampled_from([3.0, 30.0]),
        "kl": st.sampled_from([0.1, 2.0]),
    },
)


@given(lines=st.lists(LINE, min_size=1, max_size=60), cut=st.integers(0, 60))
def test_a_resumed_run_warns_as_if_it_had_never_stopped(
    lines, cut, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_dir = tmp_path_factory.mktemp("run", numbered=True)
    file = run_dir / "metrics.jsonl"
    written = [
        json.dumps({"step": step} | {f"train/{name}": value for name, value in line.items()})
        for step, line in enumerate(lines, 1)
    ]
    file.write_text("\n".join(written).replace("NaN", "null") + '\n{"step": 3, "tr')
    alarms = Alarms()
    whole = [alarms.check(step, line) for step, line in enumerate(lines, 1)]
    resumed = Alarms.from_metrics(Path(run_dir), cut)
    assert [resumed.check(n, line) for n, line in enumerate(lines[cut:], cut + 1)] == whole[cut:]
