"""An inspection as one page: no script, nothing loaded from anywhere, light or dark as the reader.

Every text that comes from data or file names goes through `html.escape`; the page forbids whatever
might come of a mistake there by its content security policy.
"""

from collections.abc import Sequence
from html import escape

from jaxsft.common.text import visible
from jaxsft.data.prepared import Prepared
from jaxsft.inspect.charts import histogram
from jaxsft.inspect.page_style import STYLE
from jaxsft.inspect.rows import Check, Fate, Survey, facts, fates, plural
from jaxsft.inspect.tokens import RowView, Segment, Token

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(prepared: Prepared, survey: Survey, rows: Sequence[RowView], *, show_ids: bool) -> str:
    """The whole page.

    Args:
      prepared: the set.
      survey: its numbers and checks.
      rows: to be shown token by token.
      show_ids: the id under each token, not only in its tooltip.
    """
    names = ", ".join(name.rpartition("/")[2] for name in prepared.report.by_source)
    failed = survey.num_failed
    verdict = f"{failed} of {len(survey.checks)} checks failed" if failed else "all checks hold"
    body = [
        "<header>",
        f'<p class="verdict {"bad" if failed else "good"}">{"✗" if failed else "✓"} {verdict}</p>',
        f"<h1>What the model will see <small>{escape(names)}</small></h1>",
        f'<p class="path">{escape(str(prepared.directory))}</p>',
        "</header>",
        _tiles(prepared, survey),
        '<div class="columns">',
        f"<div>{_checks(survey.checks, prepared.rows.num_samples)}{_quantiles(survey)}</div>",
        _fates(prepared),
        "</div>",
        _charts(prepared, survey),
    ]
    if rows:
        body.append(_legend())
        body += [_row(row, prepared.rows.row_length, show_ids) for row in rows]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Rows of {escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _tiles(prepared: Prepared, survey: Survey) -> str:
    """The counts, each large with its explanation small."""
    found = facts(prepared, survey)
    del found["sample length"]  # has a table of its own
    tiles = []
    for name, text in found.items():
        first, _, rest = text.partition(" ")
        rest = rest.strip("()")
        if first.endswith(";"):
            first = first[:-1]
        tiles.append(
            f'<div class="tile"><b>{first}</b><span>{name}</span><i>{escape(rest)}</i></div>'
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _checks(checks: Sequence[Check], num_samples: int) -> str:
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
    """What became of the rows that were read, with a bar as long as their share."""
    report = prepared.report
    lines = fates(prepared)
    lines += [Fate(f"noted: {note}", count, []) for note, count in report.noted.items()]
    if len(report.by_source) > 1:
        lines += [
            Fate(f"kept of {name.rpartition('/')[2]}", counts["samples"], [name])
            for name, counts in report.by_source.items()
        ]
    body = []
    for fate in lines:
        count = "–" if fate.num is None else f"{fate.num:,}"
        share = 100 * (fate.num or 0) / max(report.rows_read, 1)
        examples = fate.examples or (["not looked for"] if fate.num is None else [])
        small = "".join(f"<small>{escape(example)}</small>" for example in examples)
        kind = "lost" if fate.name.startswith("rejected") else "kept"
        body.append(
            f'<tr><td class="number">{count}</td><td>{escape(fate.name)}'
            f'<span class="share"><span class="{kind}" style="width:{share:.2f}%"></span></span>'
            f"{small}</td></tr>"
        )
    return (
        f'<section class="card"><h2>{report.rows_read:,} rows were read</h2>'
        f'<table class="fates">{"".join(body)}</table></section>'
    )


def _charts(prepared: Prepared, survey: Survey) -> str:
    rows, quantiles = prepared.rows, survey.quantiles()

    def percent(value: float) -> str:
        return f"{100 * value:.4g}%"

    def number(value: float) -> str:
        return f"{value:,.0f}"

    shares = survey.num_labels_S / survey.lengths_S
    fill = survey.row_tokens_R / rows.row_length
    marks = {name: quantiles[name] for name in ("p50", "p99", "p90", "p10")}
    charts = {
        "Sample length": histogram(
            survey.lengths_S, quantiles["max"], "tokens in a sample", "samples", number, marks
        ),
        "Row fill": histogram(
            fill, 1.0, "share of a row that is not padding", "rows", percent, {"mean": fill.mean()}
        ),
        "Loss share": histogram(
            *(shares, 1.0, "share of a sample's tokens that is trained on", "samples", percent),
            {"mean": shares.mean()},
        ),
    }
    figures = [f"<figure><h2>{name}</h2>{svg}</figure>" for name, svg in charts.items()]
    return f'<section class="charts">{"".join(figures)}</section>'


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
        f'<section class="row" id="row-{row.number}"><h3>Row {row.number} <small>'
        f"{row_length - row.num_padding:,} of {row_length:,} tokens</small></h3>"
        f'<div class="strip">{"".join(strip)}</div>{"".join(segments)}{padding}</section>'
    )


def _segment(segment: Segment, number: int, show_ids: bool) -> str:
    tokens = "".join(_token(token, show_ids) for token in segment.tokens)
    return (
        f"<article><h4>segment {number} <small>sample {segment.sample} · {escape(segment.source)} "
        f"· {segment.num_tokens:,} tokens, {segment.num_labels:,} with loss</small></h4>"
        f'<div class="tokens{" ids" if show_ids else ""}">{tokens}</div></article>'
    )


def _token(token: Token, show_ids: bool) -> str:
    ids = " ".join(map(str, token.ids))
    title = f"{ids}  {visible(' '.join(token.pieces))}".rstrip()
    shown = visible(token.text)
    body = shown.rstrip("\n")
    below = f"<small>{ids}</small>" if show_ids else ""
    classes = f"t {'l' if token.is_label else 'p'}{' c' if token.is_control else ''}"
    line_ends = "\n" * (len(shown) - len(body))
    return (
        f'<span class="{classes}" title="{escape(title)}">{escape(body)}{below}</span>{line_ends}'
    )
