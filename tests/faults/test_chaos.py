"""The command killed with SIGKILL at random moments, saves included, loses nothing."""

from pathlib import Path

import pytest
from faults.chaos import GRPO_SCENARIOS, Tally, run_chaos
from support.tiny_grpo import TinyGrpo
from support.tiny_runs import TinyRuns

NUM_KILLS = 10
# Six epochs of five steps, rows of three samples, two micro-batches, dropout.
OPTIONS = (
    *("--data.packing", "true", "--data.max_length", "192", "--num_train_epochs", "6"),
    *("--gradient_accumulation_steps", "2", "--lora.dropout", "0.1"),
)


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    tallies = run_chaos(TinyRuns(tmp_path), {"packed": OPTIONS}, NUM_KILLS, seed=0)
    check(tallies["packed"])


@pytest.mark.slow
def test_killed_grpo_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Completions and rewards among it; kills come in rollouts, rewards, updates and saves."""
    name = "grpo, two updates a rollout"
    runs = TinyGrpo(tmp_path, slow_reward=True)
    check(run_chaos(runs, {name: GRPO_SCENARIOS[name]}, NUM_KILLS, seed=0)[name])


def check(tally: Tally) -> None:
    assert tally.mismatches == []
    assert tally.kills == NUM_KILLS and tally.kills_during_save >= 3
    assert max(tally.lost) <= 2 * tally.save_steps
