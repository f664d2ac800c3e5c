"""The prompts of a run: rows read as tasks, without those that must not be trained on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from jaxsft.config import RowFileOptions
from jaxsft.data.chat import encode_prompt
from jaxsft.data.filters import contaminated
from jaxsft.data.packing import epoch_order, samples_of_epoch
from jaxsft.data.replies import Rejected
from jaxsft.data.rows import Conversation, RowOptions, Turn
from jaxsft.data.samples import DataReport, answer_template, as_list, check_any_left
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.download.names import find_row_files
from jaxsft.rewards.records import Task
from jaxsft.rewards.tasks import is_for_training, read_task, turns_of


class TaskPrompt(NamedTuple):
    """A task with the ids of its prompt, BOS included, and its row, as "file:row 17"."""

    task: Task
    ids: list[int]
    source: str


class Prompts(NamedTuple):
    """What a run trains on, and what it is measured on.

    Attributes:
      train, heldout: the prompts.
      epoch: indices of `train`, each as often as `data.weights` says.
      report: what became of every training row.
    """

    train: list[TaskPrompt]
    heldout: list[TaskPrompt]
    epoch: list[int]
    report: DataReport

    def of_rollout(self, rollout: int, num_prompts: int, seed: int) -> list[TaskPrompt]:
        """The prompts of a rollout, counted from 0: the next of a stream that is one permutation
        of the epoch after the other."""
        size, found = len(self.epoch), []
        for place in range(rollout * num_prompts, (rollout + 1) * num_prompts):
            epoch, offset = divmod(place, size)
            found.append(self.train[self.epoch[epoch_order(seed, epoch, size)[offset]]])
        return found


def read_prompts_of(
    options: RowFileOptions,
    tokenizer: Tokenizer,
    console: Console,
    *,
    rewards: Collection[str],
    max_new_tokens: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Prompts:
    """Reads all rows that the options name.

    Left out and counted: rows that are no task, MBPP's that are not for training, held-out prompts,
    and prompts that leave no room for `max_new_tokens` in a row of the batch.

    Args:
      rewards: the names of the run's rewards; see `read_task`.
      on_progress: called now and then.

    Raises:
      ValueError: a file is wrong, or too many rows are left out.
    """

    def find(files: list[str] | str) -> list[Path]:
        return find_row_files(
            as_list(files), console.print, columns=options.columns, on_progress=on_progress
        )

    files = find(options.train_files)
    if options.weights is not None and len(options.weights) != len(files):
        raise ValueError(
            f"data.weights has {len(options.weights)} numbers for {len(files)} files: give one each"
        )
    how = RowOptions(
        options.columns, template=answer_template(options.answer_template, options.system_prompt)
    )
    limit = options.max_length - max_new_tokens

    def read(
        rows: Iterator[tuple[int, str, dict]], report: DataReport, is_training: bool
    ) -> Iterator[tuple[int, TaskPrompt]]:
        for source, where, row in rows:
            report.rows_read += 1
            if report.rows_read % 1000 == 1:
                on_progress()
            task = read_task(row, how, rewards)
            if isinstance(task, Task):
                ids = encode_prompt(tokenizer, turns_of(task, options.system_prompt))
                fault = _fault(task, ids, limit, is_training)
                if fault is None:
                    report.samples += 1
                    report.num_tokens += len(ids)
                    yield source, TaskPrompt(task, ids, where)
                    continue
                task = fault
            report.reject(where, task)

    heldout_report, report = DataReport(), DataReport()
    heldout_files = find(options.eval_files)
    heldout = [each for _, each in read(_rows(heldout_files, options), heldout_report, False)]
    if heldout_files:
        check_any_left(heldout_files, RowFileOptions(max_drop=1.0), heldout_report)
        _show(console, "held out", heldout_report)
    is_heldout = contaminated([_conversation(each.task) for each in heldout])
    train, sources = [], []
    rows = list(_rows(files, options))[options.start : options.stop]
    for source, prompt in read(iter(rows), report, True):
        if rejected := is_heldout(_conversation(prompt.task)):
            report.samples -= 1
            report.num_tokens -= len(prompt.ids)
            report.reject(prompt.source, rejected)
            continue
        train.append(prompt)
        sources.append(source)
    # That MBPP's other rows are left out is no fault of a file that has them all.
    fitting = {name: n for name, n in report.rejected.items() if name != "not_for_training"}
    check_any_left(files, options, dataclasses.replace(report, rejected=fitting))
    _show(console, "train", report)
    epoch = samples_of_epoch(np.array(sources, np.int64), options.weights).tolist()
    return Prompts(train, heldout, epoch, report)


def prompts_digest(prompts: Sequence[TaskPrompt], epoch: Sequence[int] = ()) -> str:
    """16 hex digits that differ for other prompts, other answers, or another order."""
    found = hashlib.sha256(json.dumps(list(epoch)).encode())
    for task, ids, _ in prompts:
        parts = [ids, task.kind, task.answer, task.tests, task.setup]
        found.update(json.dumps(parts).encode())
    return found.hexdigest()[:16]


def _rows(files: Sequence[Path], options: RowFileOptions) -> Iterator[tuple[int, str, dict]]:
    for source, file in enumerate(files):
        for where, row in read_rows(file, options.columns, whole=True):
            yield source, where, row


def _fault(task: Task, ids: list[int], limit: int, is_training: bool) -> Rejected | None:
    if is_training and not is_for_training(task):
        why = "of MBPP only task_id 601 to 974; rows of your own have tests and no task_id"
        return Rejected("not_for_training", why)
    if len(ids) > limit:
        return Rejected("too_long", f"a prompt of {len(ids):,} tokens, limit {limit:,}")
    return None


def _conversation(task: Task) -> Conversation:
    return Conversation((Turn("user", task.prompt),), None, task.answer)


def _show(console: Console, label: str, report: DataReport) -> None:
    _, *others = report.lines()
    mean = report.num_tokens / max(report.samples, 1)
    console.print(
        f"{label}: {report.rows_read:,} rows read, {report.samples:,} prompts, {mean:.0f} tokens "
        "each"
    )
    for line in others:
        console.print(f"{label}: {line}", soft_wrap=True)
