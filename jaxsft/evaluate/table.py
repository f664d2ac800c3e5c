"""What an evaluation found, as a table in the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxsft.common.text import visible_line
from jaxsft.evaluate.intervals import Estimate
from jaxsft.evaluate.scoring import (
    Comparison,
    Metric,
    show_interval,
    show_p_value,
    show_value,
)

_MAX_LOSS = 700.0  # nats: the exponential of 710 is beyond float64


def with_perplexity(lines: Sequence[Comparison]) -> list[Comparison]:
    """The lines, and below the losses their exponentials."""
    losses = [line for line in lines if line.metric.unit == "nats"]
    others = [line for line in lines if line.metric.unit != "nats"]
    return [*losses, *map(_perplexity, losses), *others]


def _perplexity(loss: Comparison) -> Comparison:
    of_what = "per completion token" if loss.metric.name == "loss" else loss.metric.label
    name = loss.metric.name.replace("loss", "perplexity")
    estimates = [
        Estimate(_exp(each.value), _exp(each.low), _exp(each.high), each.num)
        for each in loss.estimates
    ]
    return Comparison(Metric(name, f"perplexity {of_what}", "perplexity", -1), estimates)


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > _MAX_LOSS else math.inf


def show_comparison(title: str, names: Sequence[str], lines: Sequence[Comparison]) -> Table:
    """One line a metric: each model's value and 95% interval, the difference and its p value."""
    is_pair = len(names) > 1
    table = Table(title=Text(title), box=SIMPLE_HEAD)
    for name in ("", *names, *(("difference", "p") if is_pair else ())):
        # Folded, as two names may begin with the same directories.
        table.add_column(Text(visible_line(name)), overflow="fold")
    below = "\n" if is_pair else " "  # two models fit into 80 columns with the intervals below
    for metric, estimates, difference in lines:
        cells = [
            f"{show_value(each.value, metric.unit)}{below}{show_interval(each, metric.unit)}"
            for each in estimates
        ]
        if difference is not None:
            value = show_value(difference.value, metric.unit, signed=True)
            interval = show_interval(difference, metric.unit, signed=True)
            cells += [f"{value}{below}{interval}", show_p_value(difference.p_value)]
        table.add_row(metric.label, *(cell.strip() for cell in cells))
    return table


def metric_cell(measured: Mapping[str, Any], metric: Metric) -> str:
    """A metric's value with its 95% interval, of what train's result.json keeps."""
    value = measured.get(metric.name)
    if value is None:
        return "–"
    low, high = measured.get("intervals", {}).get(metric.name) or (None, None)
    interval = ""
    if low is not None and high is not None:
        interval = show_interval(Estimate(value, low, high, 0), metric.unit)
    return f"{show_value(value, metric.unit)} {interval}".strip()
