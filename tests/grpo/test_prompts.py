"""Prompts: step to prompts by arithmetic, and what is never trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxsft.config import RowFileOptions
from jaxsft.data.packing import epoch_order, samples_of_epoch
from jaxsft.data.samples import DataReport
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.grpo.prompts import Prompts, TaskPrompt, read_prompts_of
from jaxsft.rewards.records import Task
from jaxsft.rewards.tasks import BUILT_IN


def prompt(number: int) -> TaskPrompt:
    return TaskPrompt(Task(str(number), "any", None, (), "", {}), [number], "")


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=3, max_size=3),
    num_prompts=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_a_rollouts_prompts_are_the_next_of_one_stream(
    sizes: list[int], weights: list[float], num_prompts: int, seed: int
) -> None:
    sources = np.repeat(np.arange(len(sizes)), sizes)
    epoch = samples_of_epoch(sources, weights[: len(sizes)]).tolist()
    if not epoch:
        return
    counts = [sources[epoch].tolist().count(source) for source in range(len(sizes))]
    assert counts == pytest.approx(np.multiply(sizes, weights[: len(sizes)]), abs=1)
    train = [prompt(i) for i in range(len(sources))]
    prompts = Prompts(train, [], epoch, DataReport())
    stream = [
        train[epoch[place]]
        for number in range(9 * 9 // len(epoch) + 1)
        for place in epoch_order(seed, number, len(epoch))
    ]
    for rollout in (8, 0, 3):  # in any order: nothing is kept between them
        low = rollout * num_prompts
        expected = stream[low : low + num_prompts]
        assert prompts.of_rollout(rollout, num_prompts, seed) == expected


def test_what_is_never_trained_on(tokenizer: Tokenizer, write: Callable[..., Path]) -> None:
    """Held-out prompts in other white space or case, MBPP's rows for tests, prompts too long."""
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    asked = "How many apples has Tom after he gave seven of his twelve to Ann and Bob"
    rows = [
        {"question": f"{asked}?", "answer": "5\n#### 5"},
        {"question": f"  {asked.lower()}\n?", "answer": "5\n#### 5"},
        *({"text": f"Task {i}.", "task_id": i, "test_list": tests} for i in (10, 510, 600, 975)),
        *({"text": f"Task {i}.", "task_id": i, "test_list": tests} for i in (601, 974)),
        {"question": "Why? " * 400, "answer": "5\n#### 5"},
        {"question": "What is 2 + 3?", "answer": "5\n#### 5"},
    ]
    options = RowFileOptions(
        train_files=[str(write(*rows))],
        eval_files=[str(write(rows[0], name="held.jsonl"))],
        max_length=512,
        max_drop=1.0,
    )
    console = Console(quiet=True)
    found = read_prompts_of(options, tokenizer, console, rewards=BUILT_IN, max_new_tokens=100)
    assert [each.source.split(":")[-1] for each in found.train] == ["7", "8", "10"]
    assert [each.task.answer for each in found.heldout] == ["5"]
    assert found.report.rejected == {"contaminated": 2, "not_for_training": 4, "too_long": 1}
