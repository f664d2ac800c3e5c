"""The rewards of answers to tasks as metrics: by reward, right answers in all and by kind."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsft.evaluate.intervals import difference, mean, share
from jaxsft.evaluate.scoring import Comparison, Metric
from jaxsft.rewards.records import Reward, Task, total_reward

RIGHT = ("answer", "tests")  # rewards that say whether an answer is right
REWARD = Metric("reward", "reward", "reward", 1)
RIGHT_ANSWERS = Metric("right", "right answers", "rate", 1)
PASSED = Metric("tests_passed", "all tests passed", "rate", 1)

Rewards = Sequence[Mapping[str, Reward]]  # of each answer, by name


def is_right(rewards: Mapping[str, Reward]) -> bool | None:
    """Whether the answer is wholly right; None where no reward says."""
    found = [rewards[name].value >= 1 for name in RIGHT if name in rewards]
    return all(found) if found else None


def reward_metrics(found: Mapping[str, object]) -> list[Metric]:
    """The metrics of `compare_rewards` among measurements by name."""
    metrics = [each for each in (PASSED, REWARD) if each.name in found]
    for name in found:
        kind, _, of = name.partition("_")
        if kind == "reward" and of:
            metrics.append(Metric(name, _label(of), "reward", 1))
        elif name == RIGHT_ANSWERS.name or (kind == "right" and of):
            label = RIGHT_ANSWERS.label + (f", {of}" if of else "")
            metrics.append(Metric(name, label, "rate", 1))
    return metrics


def compare_rewards(
    tasks: Sequence[Task],
    weights: Mapping[str, float],
    left: Rewards,
    right: Rewards | None = None,
) -> list[Comparison]:
    """Metrics of one model's answers to the tasks, or of two models' answers.

    They are the whole reward, each reward over the tasks that it applies to, before its weight, and
    the share of right answers, with several kinds of tasks also by kind.
    """
    sides = [left] if right is None else [left, right]
    lines = [_compare(REWARD, [[total_reward(each, weights) for each in side] for side in sides])]
    for name in weights:
        values = [[each[name].value for each in side if name in each] for side in sides]
        if values[0]:
            lines.append(_compare(Metric(f"reward_{name}", _label(name), "reward", 1), values))
    hits = [[is_right(each) for each in side] for side in sides]
    kinds = sorted({task.kind for task in tasks})
    for kind in (None, *(kinds if len(kinds) > 1 else ())):
        metric = RIGHT_ANSWERS
        if kind is not None:
            metric = Metric(f"right_{kind}", f"right answers, {kind}", "rate", 1)
        of_kind = [i for i, task in enumerate(tasks) if kind in (None, task.kind)]
        known = [i for i in of_kind if None not in [side[i] for side in hits]]
        if known:
            lines.append(_compare(metric, [[bool(side[i]) for i in known] for side in hits]))
    return lines


def compare_passed(
    left: Sequence[bool | None], right: Sequence[bool | None] | None = None
) -> list[Comparison]:
    """The share of tasks whose tests all pass, in the format or not, of one model or of two; []
    where no task has tests."""
    sides = [left] if right is None else [left, right]
    found = [[each for each in side if each is not None] for side in sides]
    return [_compare(PASSED, found)] if found[0] else []


def _compare(metric: Metric, sides: Sequence[Sequence[float]]) -> Comparison:
    estimator: Any = share if metric.unit == "rate" else mean
    gain = difference(sides[0], sides[1]) if len(sides) > 1 else None
    return Comparison(metric, [estimator(side) for side in sides], gain)


def _label(reward: str) -> str:
    """Of a user's reward the function alone: a path would not fit into a table."""
    return f"reward {reward.rpartition(':')[2]}"
