"""Warnings while a policy trains: what goes wrong, in a line with its number and what to change.

A value is a mean over the last steps that were logged, so that one odd rollout warns of nothing.
"""

import math
from collections import deque
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxsft.run.metrics import logged_metrics

_START_STEPS = 5  # the start is the mean of the first values
# A warning is over when its value is back by this share of its limit: one that wavers says it once.
_EASE = 0.1


class _Rule(NamedTuple):
    """Warns when a metric's mean over its last `steps` is above `limit`; with `of_start`, when it
    is below `limit` times its start."""

    metric: str
    steps: int
    limit: float
    of_start: bool = False


_RULES = {
    _Rule("dead_groups", 20, 1 - 1e-9): "no group had different rewards for {steps} steps: nothing "
    "is learned. rollouts.jsonl has the reason of each reward. Take prompts that are right "
    "sometimes (data.train_files), begin with an adapter that has the form (fork_from), or raise "
    "rollout.num_generations",
    _Rule("dead_groups", 10, 0.8): "{now:.1%} of groups had equal rewards in the last {steps} "
    "steps (over 80%): they teach nothing. Take prompts that are neither too easy nor too hard "
    "(data.train_files), or raise rollout.num_generations or rollout.num_prompts",
    _Rule("truncated", 5, 0.3): "{now:.1%} of completions were cut off in the last {steps} steps "
    "(over 30%). Raise rollout.max_new_tokens, or begin with an adapter that ends its answers "
    "(fork_from)",
    _Rule("entropy", 5, 0.25, of_start=True): "entropy is {now:.3g} nats a token in the last "
    "{steps} steps, below a quarter of its start, {start:.3g}: completions become alike. Lower "
    "learning_rate, or raise objective.beta or objective.epsilon_high",
    _Rule("reasoning_words", 5, 0.5, of_start=True): "reasoning has {now:.1f} words in the last "
    "{steps} steps, below half of its start, {start:.1f}. Raise reward.min_reasoning_words or "
    "objective.beta, or lower learning_rate",
    # At this bound a completion of 40 tokens is about e^20 times as likely as it was at the start.
    _Rule("kl", 5, 0.5): "KL to the start is {now:.3g} nats a token in the last {steps} steps "
    "(over 0.5): the model may lose what it could do. Raise objective.beta or lower learning_rate",
}


class Alarms:
    """Says what goes wrong when it begins, and again only after it was over.

    A metric that a step lacks, or that is not finite, warns of nothing.
    """

    def __init__(self) -> None:
        self._watches = [_Watch(rule) for rule in _RULES]

    @classmethod
    def from_metrics(cls, run_dir: Path, up_to_step: int) -> Self:
        """The alarms of a run that goes on from a step: as if it had never stopped."""
        alarms = cls()
        alarms.replay(run_dir, up_to_step)
        return alarms

    def replay(self, run_dir: Path, up_to_step: float = math.inf) -> list[tuple[int, str]]:
        """Checks the lines of metrics.jsonl up to a step; the warnings, with their steps."""
        found = []
        for line in logged_metrics(run_dir, up_to_step):
            metrics = {name.removeprefix("train/"): value for name, value in line.items()}
            found += [(line["step"], warning) for warning in self.check(line["step"], metrics)]
        return found

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """The warnings that begin with this step, a line each.

        Args:
          step: of the metrics, later than those before. One that metrics.jsonl gets no line of
            must not come here: a resumed run would not know of it.
          metrics: as the loop names them, without "train/".
        """
        begun = [w for w in self._watches if w.begins(step, metrics.get(w.rule.metric))]
        return [_RULES[watch.rule].format(**watch.told) for watch in begun]


class _Watch:
    """What one rule knows of the steps so far; `told` goes into its text."""

    def __init__(self, rule: _Rule) -> None:
        self.rule = rule
        self.told: dict[str, float] = {}
        self._start: list[float] = []
        self._first_step: int | None = None
        self._recent: deque[tuple[int, float]] = deque()  # of the last rule.steps
        self._is_on = False

    def begins(self, step: int, value: Any) -> bool:
        """Whether the warning begins with this value of the metric."""
        rule, value = self.rule, float(value) if isinstance(value, Real) else math.nan
        if not math.isfinite(value):
            return False
        self._first_step = step if self._first_step is None else self._first_step
        self._start += [value] * (len(self._start) < _START_STEPS)
        self._recent.append((step, value))
        while self._recent[0][0] <= step - rule.steps:
            self._recent.popleft()
        knows_start = len(self._start) == _START_STEPS or not rule.of_start
        if step - self._first_step + 1 < rule.steps or not knows_start:
            return False
        now = math.fsum(value for _, value in self._recent) / len(self._recent)
        start = math.fsum(self._start) / len(self._start)
        self.told = {"now": now, "start": start, "steps": rule.steps}
        limit = rule.limit * start if rule.of_start else rule.limit
        beyond = limit - now if rule.of_start else now - limit
        was_on, self._is_on = self._is_on, beyond > (-_EASE * limit if self._is_on else 0.0)
        return self._is_on and not was_on
