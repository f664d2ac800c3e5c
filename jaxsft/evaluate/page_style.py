"""The style sheet and the script of the page (page.py)."""

STYLE = """
:root { --page: #f4f5f8; --card: #fff; --ink: #1a2130; --soft: #5b6677; --dim: #6d7787;
  --line: #dde1e9; --fill: #eef1f6; --focus: #2f6fde; --bar: #3f7fd0; --band: #b9d2f2;
  --reasoning: #7a4fc0; --answer: #0b63b8; --answer-soft: #e6f0fc; --outside: #8a4b12;
  --good: #176a38; --good-soft: #dff3e5; --bad: #ab2119; --bad-soft: #fbe5e2;
  --near: #7d5200; --near-soft: #fbeecd; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #191f28; --ink: #e8edf4; --soft: #9ba7b8; --dim: #8e9aab;
    --line: #2c3542; --fill: #232b36; --focus: #7fb0ff; --bar: #6aa5f0; --band: #2c4a70;
    --reasoning: #b795f5; --answer: #7cbcff; --answer-soft: #17304b; --outside: #e0a56b;
    --good: #76d898; --good-soft: #163424; --bad: #ff938a; --bad-soft: #44201e;
    --near: #f0c562; --near-soft: #3b2f12; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 64px; }
header { margin-bottom: 16px; }
header h1 { margin: 0; font-size: 27px; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
.card, article { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 550; }
thead th { color: var(--soft); font-size: 13px; padding: 0 20px 6px 0; vertical-align: bottom;
  overflow-wrap: anywhere; }
tbody th, td { padding: 5px 20px 5px 0; border-top: 1px solid var(--line); vertical-align: top; }
td b { font-weight: 650; }
td i { font-style: normal; color: var(--soft); font-size: 13px; white-space: nowrap; }
td em { font-style: normal; font-size: 13px; font-weight: 600; }
em.good { color: var(--good); }
em.bad { color: var(--bad); }
.track { display: block; position: relative; height: 6px; margin: 3px 0 2px; max-width: 240px;
  border-radius: 3px; background: var(--fill); }
.track span { position: absolute; height: 100%; border-radius: 3px; background: var(--band); }
.track b { position: absolute; top: -1px; width: 4px; height: 8px; margin-left: -2px;
  border-radius: 2px; background: var(--bar); }
.note { margin: 10px 0 0; color: var(--soft); font-size: 12.5px; }
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
small { color: var(--soft); }
kbd { padding: 0 5px; border: 1px solid var(--line); border-radius: 4px; background: var(--card);
  font: 12px ui-monospace, monospace; }
article { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 8px 14px;
  scroll-margin-top: 110px; content-visibility: auto; contain-intrinsic-height: auto 420px; }
article > h2 { margin: 1px 0 0; color: var(--soft); font-size: 14px; }
article:focus { outline: 2px solid var(--focus); }
.sides { grid-column: 1 / -1; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.sides section { min-width: 0; border-top: 1px solid var(--line); padding-top: 8px; }
h3 { margin: 0; font-size: 14px; overflow-wrap: anywhere; }
.badges { display: flex; flex-wrap: wrap; align-items: center; gap: 5px; margin: 4px 0 6px; }
.badge { padding: 0 8px; border-radius: 99px; font-size: 12.5px; font-weight: 600;
  overflow-wrap: anywhere; }
.badge.good { color: var(--good); background: var(--good-soft); }
.badge.bad { color: var(--bad); background: var(--bad-soft); }
.badge.near { color: var(--near); background: var(--near-soft); }
.badges small { margin-left: 3px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.sides .text { max-height: 34em; overflow: auto; }
.reasoning { color: var(--dim); }
.answer { font-weight: 600; background: var(--answer-soft); border-radius: 4px; padding: 1px 4px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.outside { color: var(--outside); }
.tag { padding: 0; background: none;
  font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.tag.reasoning { color: var(--reasoning); }
.tag.answer { color: var(--answer); }
details summary { color: var(--soft); cursor: pointer; font-size: 13.5px; }
details summary b { color: var(--ink); }
details .text { margin-top: 6px; padding-left: 12px; border-left: 3px solid var(--line); }
.prompt details { margin-top: 6px; }
@media (max-width: 700px) {
  main { padding: 16px 12px 48px; }
  .card, article { padding: 12px; }
  .filters { position: static; }
  .filters small { display: none; }
  #search { flex: 1 1 100%; }
  article { scroll-margin-top: 12px; }
  .sides .text { max-height: none; }
  table, tbody { display: block; }
  thead { display: none; }
  tr { display: flex; flex-wrap: wrap; gap: 0 14px; padding: 6px 0;
    border-top: 1px solid var(--line); }
  tr:first-child { border: 0; padding-top: 0; }
  tbody th, td { padding: 0; border: 0; }
  tbody th { flex: 0 0 100%; }
  td { flex: 1 1 130px; min-width: 0; }
  td:empty { display: none; }
  td::before { content: attr(data-name); display: block; color: var(--soft); font-size: 13px;
    line-height: 1.3; overflow-wrap: anywhere; } }
@media print { .filters { display: none !important; } .sides .text { max-height: none; } }
"""

SCRIPT = """
const rows = [...document.querySelectorAll("article")];
const texts = rows.map(row =>
  [...row.querySelectorAll(".text")].map(text => text.textContent).join("\\n").toLowerCase());
const form = document.querySelector(".filters");
const search = document.querySelector("#search");

function filter() {
  const kind = form.querySelector(":checked").value;
  const wanted = search.value.toLowerCase();
  rows.forEach((row, i) => {
    const fits = kind === "all" || row.dataset.kinds.split(" ").includes(kind);
    row.hidden = !fits || !texts[i].includes(wanted);
  });
  const shown = rows.filter(row => !row.hidden).length;
  form.querySelector("output").textContent = `${shown} of ${rows.length} prompts`;
}

function step(by) {
  const shown = rows.filter(row => !row.hidden);
  const here = shown.indexOf(document.activeElement.closest("article"));
  const next = here < 0 ? shown[0] : shown[here + by];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView(); }
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    search.value = "";
    form.querySelector("[value=all]").checked = true;
    filter();
  } else if (event.target === search) {
    return;
  } else if (event.key === "/") {
    event.preventDefault();
    search.focus();
  } else if (event.key === "j" || event.key === "k") {
    step(event.key === "j" ? 1 : -1);
  }
});
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
if (rows.length) {
  document.documentElement.className = "scripted";
  filter();
}
"""
