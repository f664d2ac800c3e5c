"""The table in the terminal, and the lines that only it and the page have."""

import io
import math

import pytest
from rich.console import Console

from jaxsft.evaluate.intervals import Estimate, PairedDifference
from jaxsft.evaluate.scoring import Comparison, Metric
from jaxsft.evaluate.table import (
    show_comparison,
    show_interval,
    show_p_value,
    show_value,
    with_perplexity,
)

LOSS = Metric("loss", "held-out loss", "nats", -1)
OF_ANSWER = Metric("loss_answer", "of the answer", "nats", -1)
RATE = Metric("accuracy", "accuracy", "rate", 1)
LINES = [
    Comparison(LOSS, [Estimate(1.0, 0.5, 2.0, 9)] * 2, PairedDifference(0.0, -0.5, 0.5, 9, 1.0)),
    Comparison(OF_ANSWER, [Estimate(800.0, math.nan, math.nan, 9)] * 2),
    Comparison(RATE, [Estimate(0.5, 0.4, 0.6, 9)] * 2, PairedDifference(0.25, 0.1, 0.5, 9, 0.0001)),
]


def test_perplexities_are_exponentials_below_the_losses() -> None:
    lines = with_perplexity(LINES)
    assert [line.metric.name for line in lines] == [
        *("loss", "loss_answer", "perplexity", "perplexity_answer", "accuracy")
    ]
    assert lines[3].metric.label == "perplexity of the answer"
    assert lines[2].estimates[0][:3] == pytest.approx((math.e, math.exp(0.5), math.exp(2)))
    assert lines[3].estimates[0].value == math.inf and math.isnan(lines[3].estimates[0].low)


def test_names_can_be_told_apart_on_a_narrow_terminal() -> None:
    file = io.StringIO()
    names = [f"/{'x' * 40}Q", f"/{'x' * 40}[Z]"]
    table = show_comparison("rows [/x]", names, LINES)
    Console(file=file, width=80, markup=False).print(table)
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert "rows [/x]" in shown and "Q" in shown and "Z" in shown and shown.count("x") == 81
    words = shown.split()
    assert "50.0%" in words and "[40.0," in words and "+25.0" in words and "0.001" in words


def test_numbers_for_people() -> None:
    assert (show_value(0.75, "rate"), show_value(4 / 3, "words")) == ("75.0%", "1.3")
    assert show_value(-0.125, "rate", signed=True) == "−12.5 points"
    assert (show_value(1.23456, "nats"), show_value(1234, "count")) == ("1.2346", "1,234")
    assert show_interval(Estimate(0.75, 0.301, 0.954, 4), "rate") == "[30.1, 95.4]"
    assert show_interval(Estimate(2, math.nan, math.nan, 4), "count") == ""
    assert (show_value(math.nan, "words"), show_p_value(math.nan)) == ("–", "–")
    assert (show_p_value(0.0341), show_p_value(1e-9)) == ("0.034", "< 0.001")
