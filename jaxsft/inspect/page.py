"""An inspection as one page, without a script.

Every text that comes from data or file names goes through `html.escape`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxsft.common.page_style import html_page
from jaxsft.common.text import plural, visible_text
from jaxsft.data.prepared import Prepared
from jaxsft.inspect.rows import SampleCheck, Survey, facts, fates, lessons
from jaxsft.inspect.tokens import RowView, Segment, Token

_NUM_BINS = 40
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 24, 42  # margins around the bars, for the axes' numbers
_CHAR_WIDTH = 6.8  # of the labels, in the SVG's units


def inspection_page(
    prepared: Prepared, survey: Survey, rows: Sequence[RowView], *, show_ids: bool
) -> str:
    """The whole page, as HTML.

    Args:
      prepared: the set.
      survey: its counts and checks.
      rows: those to show token by token.
      show_ids: show the id under each token, not only in its tooltip.
    """
    names = ", ".join(name.rpartition("/")[2] for name in prepared.report.by_source)
    failed = survey.num_failed
    verdict = '<p class="badge verdict good">✓ all checks hold</p>'
    if failed:
        verdict = (
            f'<p class="badge verdict bad">✗ {failed} of {len(survey.checks)} checks failed</p>'
        )
    body = [
        "<header>",
        verdict,
        f"<h1>What the model will see <small>{escape(names)}</small></h1>",
        f'<p class="path">{escape(str(prepared.directory))}</p>',
        "</header>",
        _tiles(prepared, survey),
        _lessons(prepared),
        '<div class="columns">',
        f"<div>{_checks(survey.checks, prepared.rows.num_samples)}{_quantiles(survey)}</div>",
        _fates(prepared),
        "</div>",
        _charts(prepared, survey),
    ]
    if rows:
        body.append(_legend())
        body += [_row(row, prepared.rows.row_length, show_ids) for row in rows]
    return html_page(f"Rows of {names}", body)


def _tiles(prepared: Prepared, survey: Survey) -> str:
    """A tile for each count: the number large, its explanation small."""
    found = facts(prepared, survey)
    del found["sample length"]  # has a table of its own
    tiles = []
    for name, text in found.items():
        first, _, rest = text.partition(" ")
        tiles.append(
            f'<div class="card tile"><b>{first.rstrip(";")}</b><span>{name}</span>'
            f"<i>{escape(rest.strip('()'))}</i></div>"
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _lessons(prepared: Prepared) -> str:
    """The system text, the form of the answers, the policies and the columns."""
    lines = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in lessons(prepared).items()
    )
    return (
        '<section class="card"><h2>What is taught</h2>'
        f'<table class="lessons">{"".join(lines)}</table></section>'
    )


def _checks(checks: Sequence[SampleCheck], num_samples: int) -> str:
    items = []
    for check in checks:
        name = escape(check.name)
        if not check.num_failed:
            items.append(f'<li class="good">{name}</li>')
            continue
        examples = "".join(f"<li>{escape(example)}</li>" for example in check.examples)
        more = "<li>…</li>" if check.num_failed > len(check.examples) else ""
        items.append(
            f'<li class="bad">{name}: <b>not in {plural(check.num_failed, "sample")}</b>'
            f"<ul>{examples}{more}</ul></li>"
        )
    return (
        f'<section class="card"><h2>Checked in all {num_samples:,} samples</h2>'
        f'<ul class="checks">{"".join(items)}</ul></section>'
    )


def _fates(prepared: Prepared) -> str:
    """The rows that were read, each group with a bar as long as its share."""
    num_read, body = prepared.report.rows_read, []
    for fate in fates(prepared):
        count = "–" if fate.num is None else f"{fate.num:,}"
        share = 100 * (fate.num or 0) / max(num_read, 1)
        small = "".join(f"<small>{escape(example)}</small>" for example in fate.examples)
        kind = "lost" if fate.name.startswith("rejected") else "kept"
        body.append(
            f'<tr><td class="number">{count}</td><td>{escape(fate.name)}'
            f'<span class="track"><span class="{kind}" style="width:{share:.2f}%"></span></span>'
            f"{small}</td></tr>"
        )
    return (
        f'<section class="card"><h2>{num_read:,} rows were read</h2>'
        f'<table class="fates">{"".join(body)}</table></section>'
    )


def _charts(prepared: Prepared, survey: Survey) -> str:
    rows, quantiles = prepared.rows, survey.quantiles()

    def percent(value: float) -> str:
        return f"{100 * value:.4g}%"

    def number(value: float) -> str:
        return f"{value:,.0f}"

    lengths, shares = survey.lengths_S, survey.num_labels_S / survey.lengths_S
    fill = survey.row_tokens_R / rows.row_length
    marks = {name: quantiles[name] for name in ("p50", "p99", "p90", "p10")}
    length_axis, fill_axis = "tokens in a sample", "share of a row that is not padding"
    share_axis, longest = "share of a sample's tokens that is trained on", quantiles["max"]
    charts = {
        "Sample length": _histogram(lengths, longest, length_axis, "samples", number, marks),
        "Row fill": _histogram(fill, 1.0, fill_axis, "rows", percent, {"mean": fill.mean()}),
        "Loss share": _histogram(
            shares, 1.0, share_axis, "samples", percent, {"mean": shares.mean()}
        ),
    }
    cards = [
        f'<section class="card"><h2>{name}</h2>{svg}</section>' for name, svg in charts.items()
    ]
    return f'<section class="charts">{"".join(cards)}</section>'


def _histogram(
    values: npt.NDArray[Any],
    limit: float,
    axis: str,
    what: str,
    tick: Callable[[float], str],
    marks: Mapping[str, float],
) -> str:
    """A histogram of `values` from 0 to `limit`, as inline SVG.

    Args:
      values: [n], each from 0 to `limit`.
      limit: right end of the axis; above 0.
      axis: name of the axis.
      what: the things that are counted, for the tooltips.
      tick: text of a value.
      marks: positions of vertical lines, by name, the most important first.
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
                f"<title>{escape(tip)}</title></rect>"
            )
    parts.append(f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}"/>')
    for value in np.arange(0, limit * 1.001, _nice_step(limit)).tolist():
        parts.append(
            f'<text x="{x_of(value):.1f}" y="{base + 15}" class="mid">{tick(value)}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 7}" class="mid axis-name">'
        f"{escape(axis)}</text>"
    )
    parts += _marks(marks, x_of, tick, base)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"Histogram: {axis}")}">{"".join(parts)}</svg>'
    )


def _marks(
    marks: Mapping[str, float],
    x_of: Callable[[float], float],
    tick: Callable[[float], str],
    base: float,
) -> list[str]:
    """Vertical lines with names above; without room for all names, the first ones have theirs."""
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
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that takes at most 5 steps to `most`."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= most)


def _quantiles(survey: Survey) -> str:
    quantiles = survey.quantiles()
    head = "".join(f"<th>{name}</th>" for name in quantiles)
    cells = "".join(f"<td>{length:,}</td>" for length in quantiles.values())
    return (
        '<section class="card"><h2>Sample length, tokens</h2><table class="quantiles">'
        f"<tr>{head}</tr><tr>{cells}</tr></table></section>"
    )


def _legend() -> str:
    return (
        '<section class="legend"><h2>Rows, token by token</h2><p><span class="t p">prompt</span> '
        '<span class="t l">trained on</span> <span class="t p c">&lt;control&gt;</span> '
        '<span class="t l c">&lt;control&gt;, trained on</span> <span class="t pad">padding</span> '
        "↵ end of line, ⇥ tab. Point at a token for its id and piece. Tokens of one segment never "
        "see those of another.</p></section>"
    )


def _row(row: RowView, row_length: int, show_ids: bool) -> str:
    strip = [
        f'<span class="{"l" if is_label else "p"}{" first" if not number else ""}" '
        f'style="flex:{length}"></span>'
        for segment in row.segments
        for number, (is_label, length) in enumerate(segment.runs())
    ]
    padding = ""
    if row.num_padding:
        strip.append(f'<span class="pad" style="flex:{row.num_padding}"></span>')
        padding = f'<p class="t pad">{row.num_padding:,} tokens of padding</p>'
    segments = [_segment(each, number, show_ids) for number, each in enumerate(row.segments, 1)]
    return (
        f'<section class="card row" id="row-{row.number}"><h3>Row {row.number} <small>'
        f"{row_length - row.num_padding:,} of {row_length:,} tokens</small></h3>"
        f'<div class="strip">{"".join(strip)}</div>{"".join(segments)}{padding}</section>'
    )


def _segment(segment: Segment, number: int, show_ids: bool) -> str:
    tokens = "".join(_token(token, show_ids) for token in segment.tokens)
    return (
        f"<h4>segment {number} <small>sample {segment.sample} · {escape(segment.source)} "
        f"· {segment.num_tokens:,} tokens, {segment.num_labels:,} with loss</small></h4>"
        f'<div class="tokens{" ids" if show_ids else ""}">{tokens}</div>'
    )


def _token(token: Token, show_ids: bool) -> str:
    ids = " ".join(map(str, token.ids))
    title = f"{ids}  {visible_text(' '.join(token.pieces))}".rstrip()
    shown = visible_text(token.text)
    body = shown.rstrip("\n")
    below = f"<small>{ids}</small>" if show_ids else ""
    classes = f"t {'l' if token.is_label else 'p'}{' c' if token.is_control else ''}"
    line_ends = "\n" * (len(shown) - len(body))
    return (
        f'<span class="{classes}" title="{escape(title)}">{escape(body)}{below}</span>{line_ends}'
    )
