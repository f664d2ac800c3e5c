"""What rewards are about: a task, an answer to it, and what that earns."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsft.data.rows import Turn


class Task(NamedTuple):
    """What one row asks, and how its answers are told right from wrong.

    Attributes:
      prompt: the user's turn, without the system text.
      kind: "number", "text", "code", or the name in the row's `kind`.
      answer: the right answer as a text; None for code, and where only a user's own reward scores.
      tests: assert statements; the first is shown in the prompt. Empty but for code.
      setup: code that runs before the solution.
      row: the row as it was read, for a user's own reward.
      earlier: the turns before the prompt; the first may be a system text of the row's own, which
        stands in place of the run's.
    """

    prompt: str
    kind: str
    answer: str | None
    tests: tuple[str, ...]
    setup: str
    row: dict[str, Any]
    earlier: tuple[Turn, ...] = ()


class Completion(NamedTuple):
    """A generated text without its stop token, and whether that token ended it."""

    text: str
    stopped: bool


class Reward(NamedTuple):
    """What a completion earns before the reward's weight, and why, in a few words."""

    value: float
    reason: str


def total_reward(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> float:
    """What a completion earns: the sum of weight · value."""
    return math.fsum(weights[name] * reward.value for name, reward in rewards.items())
