"""The numbers of an evaluation as text, and the table of them in the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxsft.common.text import visible_line
from jaxsft.evaluate.intervals import Estimate, PairedDifference
from jaxsft.evaluate.scoring import Comparison, Metric

_MAX_LOSS = 700.0  # nats: the exponential of 710 is beyond float64


def with_perplexity(lines: Sequence[Comparison]) -> list[Comparison]:
    """The lines, with the exponentials of the losses below the losses."""
    losses = [line for line in lines if line.metric.unit == "nats"]
    others = [line for line in lines if line.metric.unit != "nats"]
    return [*losses, *map(_perplexity, losses), *others]


def _perplexity(loss: Comparison) -> Comparison:
    of_what = "per completion token" if loss.metric.name == "loss" else loss.metric.label
    name = loss.metric.name.replace("loss", "perplexity")
    estimates = [Estimate._make([*map(_exp, each[:3]), each.num]) for each in loss.estimates]
    return Comparison(Metric(name, f"perplexity {of_what}", "perplexity", -1), estimates)


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > _MAX_LOSS else math.inf


def show_comparison(title: str, names: Sequence[str], lines: Sequence[Comparison]) -> Table:
    """A line for each metric: every model's value and 95% interval, the difference, its p value."""
    is_pair = len(names) > 1
    table = Table(title=Text(title), box=SIMPLE_HEAD)
    for name in ("", *names, *(("difference", "p") if is_pair else ())):
        # Long names are folded: cut off, two names in the same directories would look alike.
        table.add_column(Text(visible_line(name)), overflow="fold")
    gap = "\n" if is_pair else " "  # two models fit into 80 columns with the intervals below
    for metric, estimates, difference in lines:
        cells = [
            f"{show_value(each.value, metric.unit)}{gap}{show_interval(each, metric.unit)}"
            for each in estimates
        ]
        if difference is not None:
            value = show_value(difference.value, metric.unit, signed=True)
            interval = show_interval(difference, metric.unit, signed=True)
            cells += [f"{value}{gap}{interval}", show_p_value(difference.p_value)]
        table.add_row(metric.label, *(cell.strip() for cell in cells))
    return table


def metric_cell(measured: Mapping[str, Any], metric: Metric) -> str:
    """A metric's value with its 95% interval, from the measurements in train's result.json."""
    value = measured.get(metric.name)
    if value is None:
        return "–"
    bounds = measured.get("intervals", {}).get(metric.name) or (None, None)
    low, high = (math.nan if bound is None else bound for bound in bounds)
    interval = show_interval(Estimate(value, low, high, 0), metric.unit)
    return f"{show_value(value, metric.unit)} {interval}".strip()


def show_value(value: float, unit: str, *, signed: bool = False) -> str:
    """A value for people, such as 43.2%; – for NaN. `signed` is for a difference: −1.5 points."""
    if math.isnan(value):
        return "–"
    is_share = unit in ("rate", "share")
    digits = {"nats": 4, "perplexity": 2, "count": 0, "reward": 3}.get(unit, 1)
    number = f"{value * (100 if is_share else 1):{'+' if signed else ''},.{digits}f}"
    return number.replace("-", "−") + ((" points" if signed else "%") if is_share else "")


def show_interval(estimate: Estimate | PairedDifference, unit: str, *, signed: bool = False) -> str:
    """The interval for people, such as [38.4, 48.1]; empty where there is none."""
    if math.isnan(estimate.low):
        return ""
    bounds = [show_value(x, unit, signed=signed) for x in (estimate.low, estimate.high)]
    return f"[{bounds[0]}, {bounds[1]}]".replace("%", "").replace(" points", "")


def show_p_value(p_value: float) -> str:
    """The p value for people, such as 0.034 or < 0.001; – for NaN."""
    if math.isnan(p_value):
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
