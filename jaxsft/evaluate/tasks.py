"""Rows as prompts with their tasks: what is asked, and what the answers earn."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsft.config import DataOptions
from jaxsft.data.chat import encode_prompt
from jaxsft.data.packing import Sample
from jaxsft.data.replies import Rejected
from jaxsft.data.samples import DataReport, SourceSample, read_samples, row_options
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.heldout import Prompt, read_prompts
from jaxsft.evaluate.scoring import GeneratedAnswer
from jaxsft.rewards.records import Completion, Reward, Task
from jaxsft.rewards.scorer import Scorer
from jaxsft.rewards.tasks import read_task, turns_of

_ANY_LENGTH = 1 << 24  # tokens


class Asked(NamedTuple):
    """The first rows that can be asked.

    Attributes:
      prompts, tasks: of each row. A task without answer and tests is of a row from which none can
        be read, or that has neither.
      form_only: why no task could be read from a row that is asked nevertheless.
      skipped: why a row could not be asked.
      has_samples: there are rows among them that the loss can be measured on.
    """

    prompts: list[Prompt]
    tasks: list[Task]
    form_only: DataReport
    skipped: DataReport
    has_samples: bool


class ScoredAnswers(NamedTuple):
    """What answers earn by name, and whether the tests of each pass, in the format or not."""

    rewards: Sequence[Mapping[str, Reward]]
    passed: Sequence[bool | None]


def as_asked(options: DataOptions) -> DataOptions:
    """Rows as they are asked: unfiltered and of any length, as the limit is not for prompts."""
    return dataclasses.replace(
        options,
        max_length=_ANY_LENGTH,
        without_thought="keep_plain",  # as the rows of the loss
        min_completion_tokens=0,
        drop_degenerate=False,
        drop_duplicates=False,
    )


def read_asked(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    num: int,
    rewards: Collection[str] = (),
) -> Asked:
    """The first `num` rows that are samples or tasks.

    A row with tests is asked as in GRPO, with the first of its tests; any other row with the prompt
    that it is trained with. ValueError for a file that is wrong.

    Args:
      rewards: the names of the rewards; see `read_task`.
    """
    asked = Asked([], [], DataReport(), DataReport(), False)
    if not num:
        return asked
    options, how = as_asked(options), row_options(options)
    samples = _by_row(read_samples(files, tokenizer, options, DataReport()))
    has_samples = False
    rows = (each for file in files for each in read_rows(file, options.columns))
    for (where, row), sample in zip(rows, samples, strict=False):
        task = read_task(row, how, rewards)
        has_samples |= sample is not None
        prompt = None
        if sample is not None:
            (prompt,) = read_prompts([sample], tokenizer, options.system_prompt)
        if isinstance(task, Task) and (task.tests or prompt is None):
            ids = encode_prompt(tokenizer, turns_of(task, options.system_prompt))
            reference = task.answer or "\n".join(task.tests)
            prompt = Prompt(ids, task.prompt, prompt.reference if prompt else reference)
        if prompt is None:
            assert isinstance(task, Rejected)
            asked.skipped.reject(where, task)
            continue
        if isinstance(task, Rejected):
            asked.form_only.reject(where, task)
            task = Task(prompt.text, "text", None, (), "", row)
        asked.prompts.append(prompt)
        asked.tasks.append(task)
        if len(asked.prompts) == num:
            break
    return asked._replace(has_samples=has_samples)


def _by_row(samples: Iterator[SourceSample]) -> Iterator[Sample | None]:
    """The sample of each row, None for a row that has none, without an end."""
    number = 0
    for each in samples:
        while number < each.row:
            yield None
            number += 1
        yield each.sample
        number += 1
    while True:
        yield None


def score_answers(
    scorer: Scorer, tasks: Sequence[Task], answers: Sequence[GeneratedAnswer]
) -> ScoredAnswers:
    """Scores the answer to each task."""
    completions = [Completion(each.text, each.stopped) for each in answers]
    rewards = scorer(tasks, completions)
    return ScoredAnswers(rewards, scorer.tests_passed(tasks, completions, rewards))
