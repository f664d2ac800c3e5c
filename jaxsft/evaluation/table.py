"""What an evaluation found, as a table in the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from jaxsft.evaluation.intervals import Estimate
from jaxsft.evaluation.scoring import (
    Comparison,
    Metric,
    show_interval,
    show_p_value,
    show_value,
)

_MAX_LOSS = 700.0  # nats: the exponential of 710 is beyond float64
_PERPLEXITY = Metric("perplexity", "perplexity per completion token", "perplexity", -1)


def with_perplexity(lines: Sequence[Comparison]) -> list[Comparison]:
    """The lines, and below the loss its exponential."""
    found = []
    for line in lines:
        found.append(line)
        if line.metric.name == "loss":
            estimates = [
                Estimate(_exp(each.value), _exp(each.low), _exp(each.high), each.num)
                for each in line.estimates
            ]
            found.append(Comparison(_PERPLEXITY, estimates, None))
    return found


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > _MAX_LOSS else math.inf


def show_comparison(title: str, names: Sequence[str], lines: Sequence[Comparison]) -> Table:
    """One line a metric: each model's value and 95% interval, the difference and its p value."""
    table = Table("", *names, title=title)
    is_pair = len(names) > 1
    for name in ("difference", "p") if is_pair else ():
        table.add_column(name)
    for metric, estimates, difference in lines:
        cells = [
            f"{show_value(each.value, metric.unit)} {show_interval(each, metric.unit)}".strip()
            for each in estimates
        ]
        if is_pair and difference is None:
            cells += ["", ""]
        elif difference is not None:
            value = show_value(difference.value, metric.unit, signed=True)
            interval = show_interval(difference, metric.unit, signed=True)
            cells += [f"{value} {interval}".strip(), show_p_value(difference.p_value)]
        table.add_row(metric.label, *cells)
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
