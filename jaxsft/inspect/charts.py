"""Histograms as inline SVG; the page's style sheet gives the colours (page.py)."""

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_NUM_BINS = 40
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 24, 42  # margins around the bars, for the axes' numbers
_CHAR_WIDTH = 6.8  # of the labels, in the SVG's units


def histogram(
    values: npt.NDArray[Any],
    limit: float,
    axis: str,
    what: str,
    tick: Callable[[float], str],
    marks: Mapping[str, float],
) -> str:
    """A histogram of `values` from 0 to `limit`.

    Args:
      values: [n], 0 to `limit` each.
      limit: right end of the axis; above 0.
      axis: what the values are, under the axis.
      what: what is counted, in the plural: for each bar's tooltip.
      tick: text of a value.
      marks: upright lines, by name, the most important first.
    """
    counts, edges = np.histogram(values, bins=_NUM_BINS, range=(0.0, limit))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = math.ceil(_nice_step(max(int(counts.max()), 1)))
    top = step * math.ceil(max(int(counts.max()), 1) / step)
    base = _TOP + height

    def x_of(value: float) -> float:
        return _LEFT + width * value / limit

    def y_of(count: float) -> float:
        return base - height * count / top

    parts = []
    for level in range(0, top + 1, step):
        y = y_of(level)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class="end">{level:,}</text>')
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        if count:
            tip = f"{tick(low)} to {tick(high)}: {count:,} {what}"
            bar_height = max(base - y_of(count), 1.5)  # one in a million is still to be seen
            parts.append(
                f'<rect class="bar" x="{x_of(low) + 0.5:.1f}" y="{base - bar_height:.1f}" '
                f'width="{width / _NUM_BINS - 1:.1f}" height="{bar_height:.1f}">'
                f"<title>{html.escape(tip)}</title></rect>"
            )
    parts.append(f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}"/>')
    for value in np.arange(0, limit * 1.001, _nice_step(limit)).tolist():
        parts.append(
            f'<text x="{x_of(value):.1f}" y="{base + 15}" class="mid">{tick(value)}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 7}" class="mid axis-name">'
        f"{html.escape(axis)}</text>"
    )
    parts += _marks(marks, x_of, tick, base)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(f"Histogram: {axis}")}">{"".join(parts)}</svg>'
    )


def _marks(
    marks: Mapping[str, float],
    x_of: Callable[[float], float],
    tick: Callable[[float], str],
    base: float,
) -> list[str]:
    """Upright lines with names above, the first ones if there is no room for all names."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for name, value in marks.items():
        x, half = x_of(value), _CHAR_WIDTH * len(name) / 2
        parts.append(
            f'<path class="mark" d="M{x:.1f} {_TOP - 4}V{base}"><title>{name}: {tick(value)}'
            "</title></path>"
        )
        if all(x + half < low or x - half > high for low, high in taken):
            taken.append((x - half, x + half))
            parts.append(f'<text x="{x:.1f}" y="{_TOP - 9}" class="mid mark-name">{name}</text>')
    return parts


def _nice_step(most: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, the least of which at most five make `most`."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= most)
