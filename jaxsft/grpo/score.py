"""Scores given completions without a model: what a reward pays, before a run or after it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxsft.common.console import make_console
from jaxsft.common.text import plural, visible_line
from jaxsft.data.fields import is_absent
from jaxsft.data.messages import read_text
from jaxsft.data.replies import Rejected, RejectedError
from jaxsft.data.rows import RowOptions
from jaxsft.data.sources import read_rows
from jaxsft.rewards.records import Completion, Reward, Task
from jaxsft.rewards.scorer import Scorer
from jaxsft.rewards.tasks import read_task

_BATCH = 64  # completions of a call of a user's own reward
_STOPS = ("<end_of_turn>", "<eos>")  # as a tokenizer writes them that shows control tokens
_GIVEN = ("completion", "stopped")
_PROMPT_CHARS = 60
_LOG_WIDTH = 160


def score_file(path: Path, scorer: Scorer, how: RowOptions, *, as_json: bool) -> int:
    """Prints what the completion of each row earns; returns the exit code, 0.

    A row is a prompt's, as for training, with `completion`: a text that its stop token ended,
    unless `stopped` is false.

    Args:
      path: what `read_rows` reads.
      scorer: entered.
      how: as the run converts rows.
      as_json: one line for each row, in order, and nothing else: {"reward", "rewards": {name:
        {"value", "reason"}}}, each value after its weight; {"error"} for a row that has none.

    Raises:
      ValueError: the file cannot be read, or none of its rows can be scored.
    """
    rows = read_rows(path, how.columns, whole=True)
    read = [(where, *_read(row, scorer, how)) for where, row in rows]
    usable = [(task, completion) for _, task, completion in read if isinstance(task, Task)]
    faults = [(where, task.detail) for where, task, _ in read if isinstance(task, Rejected)]
    if not usable:
        raise ValueError(f"{path}: no row can be scored: {': '.join(faults[0])}")
    rewards: list[dict[str, Reward]] = []
    for low in range(0, len(usable), _BATCH):
        rewards += scorer(*map(list, zip(*usable[low : low + _BATCH], strict=True)))
    console = make_console(log_width=None if as_json else _LOG_WIDTH, strict=True)
    if as_json:
        found = iter(rewards)
        for _, task, _ in read:
            line = (
                {"error": task.detail}
                if isinstance(task, Rejected)
                else _as_json(next(found), scorer)
            )
            console.print(json.dumps(line), soft_wrap=True)
        return 0
    console.print(_table([task.prompt for task, _ in usable], rewards, scorer))
    not_scored = f", {plural(len(faults), 'row')} not scored" if faults else ""
    console.print(_summary(rewards, scorer) + not_scored)
    for where, fault in faults[:5]:
        console.print(f"not scored: {visible_line(where)}: {visible_line(fault)}")
    return 0


def _read(row: Any, scorer: Scorer, how: RowOptions) -> tuple[Task | Rejected, Completion]:
    nothing = Completion("", False)
    if not isinstance(row, Mapping):
        return read_task(row), nothing
    task = read_task({n: v for n, v in row.items() if n not in _GIVEN}, how, scorer.weights)
    stopped = row.get("stopped")
    if not is_absent(stopped) and not isinstance(stopped, bool):
        return Rejected("wrong_field", '"stopped" must be true or false'), nothing
    try:
        text = read_text(row, "completion")
    except RejectedError as error:
        return error.rejected, nothing
    text = text.rstrip()
    for stop in _STOPS:
        text = text.removesuffix(stop)
    return task, Completion(text, stopped is not False)


def _as_json(rewards: Mapping[str, Reward], scorer: Scorer) -> dict[str, Any]:
    each = {
        name: {"value": round(scorer.weights[name] * reward.value, 12), "reason": reward.reason}
        for name, reward in rewards.items()
    }
    return {"reward": round(scorer.total(rewards), 12), "rewards": each}


def _table(
    prompts: Sequence[str], rewards: Sequence[Mapping[str, Reward]], scorer: Scorer
) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("prompt", overflow="fold")
    table.add_column("reward", justify="right")
    for name, weight in scorer.weights.items():
        table.add_column(f"{visible_line(name)} × {weight:g}", overflow="fold")
    for prompt, each in zip(map(visible_line, prompts), rewards, strict=True):
        short = prompt if len(prompt) <= _PROMPT_CHARS else f"{prompt[: _PROMPT_CHARS - 1]}…"
        cells = (_cell(each.get(name)) for name in scorer.weights)
        table.add_row(short, f"{scorer.total(each):.4g}", *cells)
    return table


def _cell(reward: Reward | None) -> str:
    return "–" if reward is None else f"{reward.value:.4g}  {visible_line(reward.reason)}"


def _summary(scored: Sequence[Mapping[str, Reward]], scorer: Scorer) -> str:
    """The number of rows, the mean reward, and each reward's mean over the rows that it is for."""
    mean = sum(map(scorer.total, scored)) / len(scored)
    parts = [f"{plural(len(scored), 'row')} scored", f"reward {mean:.4g}"]
    for name in scorer.weights:
        values = [rewards[name].value for rewards in scored if name in rewards]
        if values:
            of = "" if len(values) == len(scored) else f" of {plural(len(values), 'row')}"
            parts.append(f"{visible_line(name)} {sum(values) / len(values):.4g}{of}")
    return ", ".join(parts)
