"""The style sheet of the page (page.py)."""

STYLE = """
:root { --page: #f5f6f8; --card: #fff; --ink: #1c2430; --soft: #5c6878; --line: #dde2e9;
  --prompt: #e4e9f1; --prompt2: #d5dde8; --loss: #bfe8cb; --loss2: #a6dcb7; --control: #6d3fc4;
  --pad1: #eceef2; --pad2: #dfe3e9; --strip: #43a86b; --bar: #3f7fd0; --mark: #c2571a;
  --good: #17723a; --good-soft: #dff4e6; --bad: #b3261e; --bad-soft: #fbe4e2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1a2029; --ink: #e4e9f0; --soft: #9aa7b8; --line: #2d3643;
    --prompt: #2a3341; --prompt2: #354152; --loss: #1c5233; --loss2: #25663f; --control: #c5a5ff;
    --pad1: #1d232d; --pad2: #262e3a; --strip: #3f9a63; --bar: #5b9bea; --mark: #f0a066;
    --good: #6fd693; --good-soft: #163524; --bad: #ff8f86; --bad-soft: #45201e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { margin: 0; font-size: 27px; line-height: 1.25; letter-spacing: -.01em; }
h1 small { color: var(--soft); font-weight: 400; font-size: 17px; margin-left: 8px; }
h2 { margin: 0 0 10px; font-size: 16px; }
h3 { margin: 0 0 8px; font-size: 17px; }
h3 small, h4 small { color: var(--soft); font-weight: 400; margin-left: 6px; }
h4 { margin: 16px 0 6px; font-size: 13px; overflow-wrap: anywhere; }
.path { margin: 4px 0 20px; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.verdict { float: right; margin: 4px 0 0 16px; padding: 4px 14px; border-radius: 99px;
  font-weight: 600; }
.verdict.good { color: var(--good); background: var(--good-soft); }
.verdict.bad { color: var(--bad); background: var(--bad-soft); }
.tiles, .charts, .columns { display: grid; gap: 14px; margin-bottom: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
.columns { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); align-items: start; }
.tile, .card, figure, .row { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px;
  padding: 14px 18px; margin: 0; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { font-weight: 600; font-size: 13px; }
.tile i { display: block; font-style: normal; font-size: 12.5px; color: var(--soft); }
.columns .card + .card { margin-top: 14px; }
.checks, .checks ul { list-style: none; margin: 0; padding: 0; }
.checks > li { padding: 3px 0 3px 26px; position: relative; }
.checks > li::before { position: absolute; left: 2px; font-weight: 700; }
.checks > .good::before { content: "✓"; color: var(--good); }
.checks > .bad::before { content: "✗"; color: var(--bad); }
.checks ul li { font-size: 12.5px; color: var(--bad); overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.fates td { padding: 3px 0; vertical-align: top; }
.fates .number { width: 1%; padding-right: 14px; text-align: right; font-weight: 600; }
.fates small { display: block; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
.share { display: block; height: 5px; margin: 2px 0; border-radius: 2px; background: var(--line);
  overflow: hidden; }
.share span { display: block; height: 100%; min-width: 0; border-radius: 2px; }
.share .kept { background: var(--bar); }
.share .lost { background: var(--mark); }
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
.legend { margin: 34px 0 12px; }
.legend p { margin: 0; color: var(--soft); }
.legend .t { color: var(--ink); padding: 2px 7px; margin-right: 4px; }
.row { margin-bottom: 16px; }
.strip { display: flex; height: 14px; border-radius: 4px; overflow: hidden; }
.strip .p { background: var(--soft); opacity: .55; }
.strip .l { background: var(--strip); }
.strip .first { border-left: 2px solid var(--card); }
.strip .first:first-child { border-left: 0; }
.tokens { font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tokens.ids { line-height: 1.35; }
.t { border-radius: 3px; padding: 2px 0; unicode-bidi: isolate; }
.t.p { background: var(--prompt); }
.t.p:nth-child(even) { background: var(--prompt2); }
.t.l { background: var(--loss); }
.t.l:nth-child(even) { background: var(--loss2); }
.t.c { color: var(--control); font-weight: 700; box-shadow: inset 0 0 0 1px var(--control);
  padding: 2px 3px; }
.legend .t.c { color: var(--control); }
.t.pad, .strip .pad { background: repeating-linear-gradient(135deg, var(--pad1) 0 6px,
  var(--pad2) 6px 12px); }
p.t.pad { margin: 14px 0 2px; padding: 6px 12px; color: var(--soft); font-size: 13px; }
.tokens .t:hover { outline: 2px solid var(--mark); }
.ids .t { display: inline-block; vertical-align: top; margin: 0 1px 3px 0; padding: 1px 3px; }
.ids .t small { display: block; font-size: 9.5px; line-height: 1.2; color: var(--soft);
  font-weight: 400; }
@media (max-width: 700px) { .columns, .charts { grid-template-columns: 1fr; }
  main { padding: 16px 12px; } }
"""
