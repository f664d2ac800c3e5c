"""The frame and the style sheet of the pages that evaluate, inspect and grpo write.

A page loads nothing. Its content security policy forbids whatever might come of a mistake in
escaping: no script runs but the page's own, known by its hash. No text reorders what stands beside
it: `harmless` takes its bidi controls, and its element is isolated.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from jaxsft.common.text import harmless


def html_page(title: str, body: Sequence[str], *, script: str = "") -> str:
    """A whole page, light or dark as the reader has it.

    Args:
      title: any text.
      body: the elements inside <main>, as HTML.
      script: run at the end of the page.
    """
    policy, scripts = "default-src 'none'; style-src 'unsafe-inline'", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        scripts = f"<script>{script}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{harmless(escape(title))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + harmless("\n".join(body))
        + f"\n</main>\n{scripts}</body>\n</html>\n"
    )


STYLE = """
:root { --page: #f4f5f8; --card: #fff; --ink: #1a2130; --soft: #5b6677; --dim: #6d7787;
  --line: #dde1e9; --fill: #e9ecf2; --focus: #2f6fde; --bar: #3f7fd0; --band: #b9d2f2;
  --violet: #6d3fc4; --answer: #0b63b8; --answer-soft: #e6f0fc; --outside: #8a4b12;
  --good: #176a38; --good-soft: #dff3e5; --bad: #ab2119; --bad-soft: #fbe5e2;
  --near: #7d5200; --near-soft: #fbeecd; --mark: #c2571a; --strip: #43a86b;
  --prompt: #e4e9f1; --prompt2: #d5dde8; --loss: #bfe8cb; --loss2: #a6dcb7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #191f28; --ink: #e8edf4; --soft: #9ba7b8; --dim: #8e9aab;
    --line: #2c3542; --fill: #232b36; --focus: #7fb0ff; --bar: #6aa5f0; --band: #2c4a70;
    --violet: #c5a5ff; --answer: #7cbcff; --answer-soft: #17304b; --outside: #e0a56b;
    --good: #76d898; --good-soft: #163424; --bad: #ff938a; --bad-soft: #44201e;
    --near: #f0c562; --near-soft: #3b2f12; --mark: #f0a066; --strip: #3f9a63;
    --prompt: #2a3341; --prompt2: #354152; --loss: #1c5233; --loss2: #25663f; } }

/* All pages */
* { box-sizing: border-box; }
small, li, th, td { unicode-bidi: isolate; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 64px; }
header { margin-bottom: 16px; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 27px; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 16px; }
h3 { margin: 0; font-size: 14px; overflow-wrap: anywhere; }
small { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.track { display: block; position: relative; height: 6px; margin: 3px 0 2px; border-radius: 3px;
  background: var(--fill); overflow: hidden; }
.track span { position: absolute; height: 100%; border-radius: 3px; background: var(--band); }
.badge { padding: 0 8px; border-radius: 99px; font-size: 12.5px; font-weight: 600;
  overflow-wrap: anywhere; }
.badge.good { color: var(--good); background: var(--good-soft); }
.badge.bad { color: var(--bad); background: var(--bad-soft); }
.badge.near { color: var(--near); background: var(--near-soft); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }

/* Evaluate: the table */
.metrics th { text-align: left; font-weight: 550; }
.metrics thead th { color: var(--soft); font-size: 13px; padding: 0 20px 6px 0;
  vertical-align: bottom; overflow-wrap: anywhere; }
.metrics tbody th, .metrics td { padding: 5px 20px 5px 0; border-top: 1px solid var(--line);
  vertical-align: top; }
td b { font-weight: 650; }
td i { font-style: normal; color: var(--soft); font-size: 13px; white-space: nowrap; }
td em { font-style: normal; font-size: 13px; font-weight: 600; }
em.good { color: var(--good); }
em.bad { color: var(--bad); }
.metrics .track { max-width: 240px; overflow: visible; }
.track b { position: absolute; top: -1px; width: 4px; height: 8px; margin-left: -2px;
  border-radius: 2px; background: var(--bar); }
.note { margin: 10px 0 0; color: var(--soft); font-size: 12.5px; }

/* Evaluate: the filters */
.filters { display: none; position: sticky; top: 0; z-index: 1; margin: 0 -8px 8px; padding: 8px;
  background: var(--page); border-bottom: 1px solid var(--line); }
.scripted .filters { display: block; }
fieldset { display: flex; flex-wrap: wrap; gap: 6px; margin: 0; padding: 0; border: 0;
  min-width: 0; }
legend { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.filters label { position: relative; }
.filters input[type=radio] { position: absolute; inset: 0; opacity: 0; margin: 0; cursor: pointer;
  width: 100%; height: 100%; }
.filters label span { display: block; padding: 3px 12px; border: 1px solid var(--line);
  border-radius: 99px; background: var(--card); font-size: 13.5px; overflow-wrap: anywhere; }
.filters label b { color: var(--soft); font-weight: 600; margin-left: 3px; }
.filters label:hover span { border-color: var(--soft); }
.filters :checked + span { background: var(--ink); border-color: var(--ink); color: var(--card); }
.filters :checked + span b { color: inherit; }
.filters :focus-visible + span { outline: 2px solid var(--focus); outline-offset: 2px; }
.filters p { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; margin: 8px 0 0; }
#search { flex: 0 1 300px; min-width: 0; padding: 5px 10px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); color: inherit; font: inherit; }
output { font-weight: 600; font-variant-numeric: tabular-nums; }
kbd { padding: 0 5px; border: 1px solid var(--line); border-radius: 4px; background: var(--card);
  font: 12px ui-monospace, monospace; }

/* Evaluate: a prompt and its answers */
article { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 8px 14px;
  scroll-margin-top: 110px; content-visibility: auto; contain-intrinsic-height: auto 420px; }
article > h2 { margin: 1px 0 0; color: var(--soft); font-size: 14px; }
article:focus { outline: 2px solid var(--focus); }
.sides { grid-column: 1 / -1; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.sides section { min-width: 0; border-top: 1px solid var(--line); padding-top: 8px; }
.badges { display: flex; flex-wrap: wrap; align-items: center; gap: 5px; margin: 4px 0 6px; }
.badges small { margin-left: 3px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.sides .text { max-height: 34em; overflow: auto; }
.reasoning { color: var(--dim); }
.answer { font-weight: 600; background: var(--answer-soft); border-radius: 4px; padding: 1px 4px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.outside { color: var(--outside); }
.tag { padding: 0; background: none;
  font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.tag.reasoning { color: var(--violet); }
.tag.answer { color: var(--answer); }
details summary { color: var(--soft); cursor: pointer; font-size: 13.5px; }
details summary b { color: var(--ink); }
details .text { margin-top: 6px; padding-left: 12px; border-left: 3px solid var(--line); }
.prompt details { margin-top: 6px; }

/* Inspect: the whole set */
h1 small { font-weight: 400; font-size: 17px; margin-left: 8px; }
header .path { font-size: 12px; }
.verdict { float: right; margin: 4px 0 0 16px; padding: 4px 14px; font-size: 15px; }
.tiles, .charts, .columns { display: grid; gap: 0 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
.columns { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); align-items: start; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { font-weight: 600; font-size: 13px; }
.tile i { display: block; font-style: normal; font-size: 12.5px; color: var(--soft); }
.lessons th, .lessons td { padding: 3px 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
.lessons th { width: 14em; padding-right: 14px; font-size: 13px; }
.checks, .checks ul { list-style: none; margin: 0; padding: 0; }
.checks > li { padding: 3px 0 3px 26px; position: relative; }
.checks > li::before { position: absolute; left: 2px; font-weight: 700; }
.checks > .good::before { content: "✓"; color: var(--good); }
.checks > .bad::before { content: "✗"; color: var(--bad); }
.checks ul li { font-size: 12.5px; color: var(--bad); overflow-wrap: anywhere; }
.fates td { padding: 3px 0; vertical-align: top; }
.fates .number { width: 1%; padding-right: 14px; text-align: right; font-weight: 600; }
.fates small { display: block; font-size: 12.5px; overflow-wrap: anywhere; }
.fates .kept { background: var(--bar); }
.fates .lost { background: var(--mark); }
.chart { display: block; width: 100%; height: auto; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.chart .end { text-anchor: end; }
.chart .mid { text-anchor: middle; }
.chart .axis-name { fill: var(--ink); }
.chart .grid { stroke: var(--line); }
.chart .axis { stroke: var(--soft); }
.chart .bar { fill: var(--bar); }
.chart .bar:hover { fill: var(--mark); }
.chart .mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; }
.chart .mark-name { fill: var(--mark); font-weight: 600; }
.quantiles { table-layout: fixed; }
.quantiles th, .quantiles td { text-align: right; padding: 2px 0; }
.quantiles th { color: var(--soft); font-weight: 600; font-size: 13px; }

/* Inspect: rows, token by token */
.legend { margin: 34px 0 12px; }
.legend p { margin: 0; color: var(--soft); }
.legend .t { color: var(--ink); padding: 2px 7px; margin-right: 4px; }
.row h3 { margin: 0 0 8px; font-size: 17px; }
.row small { font-weight: 400; margin-left: 6px; }
h4 { margin: 16px 0 6px; font-size: 13px; overflow-wrap: anywhere; }
.strip { display: flex; height: 14px; border-radius: 4px; overflow: hidden; }
.strip .p { background: var(--soft); opacity: .55; }
.strip .l { background: var(--strip); }
.strip .first { border-left: 2px solid var(--card); }
.strip .first:first-child { border-left: 0; }
.tokens { font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens.ids { line-height: 1.35; }
.t { border-radius: 3px; padding: 2px 0; unicode-bidi: isolate; }
.t.p { background: var(--prompt); }
.t.p:nth-child(even) { background: var(--prompt2); }
.t.l { background: var(--loss); }
.t.l:nth-child(even) { background: var(--loss2); }
.t.c { color: var(--violet); font-weight: 700; box-shadow: inset 0 0 0 1px var(--violet);
  padding: 2px 3px; }
.legend .t.c { color: var(--violet); }
.t.pad, .strip .pad { background: repeating-linear-gradient(135deg, var(--fill) 0 6px,
  var(--line) 6px 12px); }
p.t.pad { margin: 14px 0 2px; padding: 6px 12px; color: var(--soft); font-size: 13px; }
.tokens .t:hover { outline: 2px solid var(--mark); }
.ids .t { display: inline-block; vertical-align: top; margin: 0 1px 3px 0; padding: 1px 3px; }
.ids .t small { display: block; margin: 0; font-size: 9.5px; line-height: 1.2; }

/* GRPO: the rollouts; the rest is as for evaluate */
.filters select, .filters button { padding: 4px 8px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); color: inherit; font: inherit; font-size: 13.5px;
  max-width: 100%; }
.filters input[type=range] { flex: 1 1 260px; min-width: 0; }
.scripted .unscripted { display: none; }

@media (max-width: 700px) {
  main { padding: 16px 12px 48px; }
  .card { padding: 12px; }
  .columns, .charts { grid-template-columns: 1fr; }
  .filters { position: static; }
  .filters small { display: none; }
  #search { flex: 1 1 100%; }
  article { scroll-margin-top: 12px; }
  .sides .text { max-height: none; }
  .metrics, .metrics tbody { display: block; }
  .metrics thead { display: none; }
  .metrics tr { display: flex; flex-wrap: wrap; gap: 0 14px; padding: 6px 0;
    border-top: 1px solid var(--line); }
  .metrics tr:first-child { border: 0; padding-top: 0; }
  .metrics tbody th, .metrics td { padding: 0; border: 0; }
  .metrics tbody th { flex: 0 0 100%; }
  .metrics td { flex: 1 1 130px; min-width: 0; }
  .metrics td:empty { display: none; }
  .metrics td::before { content: attr(data-name); display: block; color: var(--soft);
    font-size: 13px; line-height: 1.3; overflow-wrap: anywhere; } }
@media print { .filters { display: none !important; } .sides .text { max-height: none; } }
"""
