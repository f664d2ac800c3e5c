"""The rollouts of a run on one page: any step's groups side by side, with filters.

The completions of a step are a compressed block, which the page's script opens when the step is
shown. It puts their texts in as text; what stands in the page itself goes through `html.escape`.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxsft.common.files import write_text
from jaxsft.common.page_style import html_page
from jaxsft.common.text import plural, visible_line
from jaxsft.grpo.alarms import Alarms
from jaxsft.run.metrics import logged_metrics

_OF_GROUP = ("prompt", "source", "kind", "question")
_OF_MEMBER = ("member", "text", "num_tokens", "ended", "log_prob", "reward", "advantage", "counted")
_FIELDS = {"step", "rewards", *_OF_GROUP, *_OF_MEMBER}
_SHARES = ("right", "format", "dead_groups", "truncated")
_FACTS = ("reward", *_SHARES, "completion_tokens", "reasoning_words", "kl", "entropy")

Row = dict[str, Any]


def write_page(run_dir: Path, max_bytes: int = 30 * 10**6) -> Path:
    """Writes rollouts.html into a run's directory, and returns its path.

    Of rollouts that are too many for `max_bytes` it has as many as fit, evenly spaced, the first
    and the last among them, and says so.

    Raises:
      OSError: there is no rollouts.jsonl, or the page cannot be written.
      ValueError: no line of rollouts.jsonl is a completion.
    """
    path = run_dir / "rollouts.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the directory of a run of jaxsft.grpo")
    blocks, names, num_bad = _read(path)
    if not blocks:
        raise ValueError(f"{path}: has no completion yet; wait for the run's first rollout")
    steps = _evenly(list(blocks), [len(block) for block in blocks.values()], max_bytes)
    notes = [f"{plural(len(blocks), 'rollout')}, each by the first step that it served."]
    if len(steps) < len(blocks):
        notes.append(
            f"{len(steps):,} of them are here, evenly spaced, to keep this page below "
            f"{max_bytes / 10**6:.0f} MB; rollouts.jsonl has all."
        )
    if num_bad:
        notes.append(f"{plural(num_bad, 'line')} that cannot be read.")
    title = f"Rollouts of {visible_line(run_dir.absolute().name)}"
    index: Row = names | {"steps": steps, "facts": _facts(run_dir)}
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(' '.join(notes))}</p></header>",
        _warnings(run_dir),
        _FORM,
        *(blocks[step] for step in steps),
        _packed("index", index),
    ]
    page = run_dir / "rollouts.html"
    write_text(page, html_page(title, body, script=_SCRIPT))
    return page


def _read(path: Path) -> tuple[dict[int, str], dict[str, list[str]], int]:
    """Each step's completions as an element of the page; the names of kinds, ends and rewards; the
    number of lines that are no completion."""
    blocks: dict[int, str] = {}
    names: dict[str, set[str]] = {"kind": set(), "ended": set(), "rewards": set()}
    num_bad = 0

    def rows() -> Iterator[Row]:
        nonlocal num_bad
        for line in file:
            if row := _row(line):
                yield row
            else:
                num_bad += 1

    with path.open("rb") as file:
        for step, members in groupby(rows(), key=lambda row: row["step"]):
            groups: dict[int, Row] = {}
            for row in members:
                names["kind"].add(row["kind"])
                names["ended"].add(row["ended"])
                names["rewards"].update(row["rewards"])
                group = {name: row.pop(name) for name in _OF_GROUP} | {"members": []}
                groups.setdefault(group["prompt"], group)["members"].append(row)
            for group in groups.values():
                rewards = [member["reward"] for member in group["members"]]
                group["live"] = max(rewards) - min(rewards) > 1e-8  # as the loop has it
            blocks[step] = _packed(f"step-{step}", list(groups.values()))
    return blocks, {name: sorted(each) for name, each in names.items()}, num_bad


def _row(line: bytes) -> Row | None:
    """What a line holds; None for one that is torn, or that is no completion."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row.keys() >= _FIELDS else None


def _packed(name: str, values: Any) -> str:
    """An element that no browser runs, with base64 in it: no text can end it."""
    packed = base64.b64encode(zlib.compress(json.dumps(values).encode())).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def _evenly(steps: Sequence[int], sizes: Sequence[int], most: int) -> list[int]:
    """As many steps as fit, evenly spaced; the first and the last at least."""
    count = last = len(steps) - 1
    chosen = list(range(len(steps)))
    while count > 1 and sum(sizes[i] for i in chosen) > most:
        count = count * 49 // 50
        chosen = [i * last // count for i in range(count + 1)]
    return [steps[i] for i in chosen]


def _warnings(run_dir: Path) -> str:
    said = Alarms().replay(run_dir)
    items = "".join(f"<li>step {step}: {escape(warning)}</li>" for step, warning in said)
    return f'<section class="card"><h2>Warnings</h2><ul>{items}</ul></section>' if said else ""


def _facts(run_dir: Path) -> dict[int, str]:
    """What metrics.jsonl has of each step, in a line."""
    facts = {}
    for line in logged_metrics(run_dir):
        known = {name: line.get(f"train/{name}") for name in _FACTS}
        shown = [
            f"{name.replace('_', ' ')} " + (f"{value:.1%}" if name in _SHARES else f"{value:.4g}")
            for name, value in known.items()
            if isinstance(value, int | float)
        ]
        if shown:
            facts[line["step"]] = " · ".join(shown)
    return facts


_FORM = """<p class="unscripted">The rollouts need a browser of 2023 or later, with scripts.</p>
<form class="filters"><p><label for="at">Step <b id="now"></b></label>
<input type="range" id="at" min="0" value="0"><small><kbd>←</kbd> <kbd>→</kbd> step
<kbd>/</kbd> search <kbd>Esc</kbd> clear</small></p>
<p><select name="kind" aria-label="Kind"><option value="">any kind</option></select>
<select name="live" aria-label="Groups"><option value="">live and dead groups</option>
<option value="live">live groups</option><option value="dead">dead groups</option></select>
<select name="ended" aria-label="End"><option value="">any end</option></select>
<select name="reward" aria-label="Reward"><option value="">any reward</option></select>
<input type="search" id="search" placeholder="Search the texts" aria-label="Search">
<button>Next step with a match</button><output></output></p>
<p><small id="facts"></small></p></form>
<div id="groups"></div>"""

_SCRIPT = r"""
const $ = id => document.getElementById(id);
const form = document.querySelector(".filters"), slider = $("at"), search = $("search");
let index, groups = [], at = -1;

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
function make(tag, kind, ...parts) {
  const element = document.createElement(tag);
  element.className = kind;
  element.append(...parts);
  return element;
}
const visible = text => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, c =>
  c === "\n" ? c : c === "\t" ? "⇥\t" : `\\u{${c.codePointAt(0).toString(16)}}`);
const shown = text => make("div", "text", ...visible(text).split(/(<\/?\w+>)/).map((part, i) =>
  i % 2 ? make("span", "tag reasoning", part) : part));
const number = value => String(+value.toFixed(3));

function side(member) {
  const badge = (isGood, text) =>
    make("span", `badge ${isGood ? "good" : "bad"}`, visible(text));
  const badges = Object.entries(member.rewards).map(([name, {value, reason}]) =>
    badge(value > 0, `${name} ${number(value)}${reason ? ": " + reason : ""}`));
  badges.push(badge(member.ended === "stop", `end: ${member.ended}`));
  const out = member.counted ? "" : ", not in the loss";
  const facts = `${number(member.num_tokens)} tokens, log p ${number(member.log_prob)}${out}`;
  return make("section", "",
    make("h3", "", `reward ${number(member.reward)}, advantage ${number(member.advantage)}`),
    make("p", "badges", ...badges, make("small", "", facts)), shown(member.text));
}
function article(group, members) {
  const facts = [group.kind, group.live ? "live" : "dead", group.source];
  return make("article", "card", make("h2", "", String(group.prompt)),
    make("div", "prompt", make("small", "", visible(facts.join(" · "))), shown(group.question)),
    make("div", "sides", ...members.map(side)));
}
function pick(groups) {
  const {kind, live, ended, reward} = form.elements;
  const words = search.value.toLowerCase(), name = reward.value.slice(1);
  const fits = (group, member) => (!ended.value || member.ended === ended.value)
    && (!name || (name in member.rewards
      && (member.rewards[name].value === 0) === (reward.value[0] === "0")))
    && `${member.text}\n${group.question}`.toLowerCase().includes(words);
  return groups
    .filter(group => !kind.value || group.kind === kind.value)
    .filter(group => !live.value || group.live === (live.value === "live"))
    .map(group => [group, group.members.filter(member => fits(group, member))])
    .filter(([, members]) => members.length);
}
function draw() {
  const found = pick(groups);
  $("groups").replaceChildren(...found.map(each => article(...each)));
  form.querySelector("output").textContent =
    `${found.flatMap(each => each[1]).length} of ${groups.flatMap(g => g.members).length} ` +
    `completions in ${found.length} of ${groups.length} groups`;
}
async function go(to) {
  to = Math.max(0, Math.min(index.steps.length - 1, to));
  if (to === at) return;
  at = slider.value = to;
  const step = index.steps[to], opened = await unpack(`step-${step}`);
  if (at !== to) return;
  groups = opened;
  $("now").textContent = step;
  $("facts").textContent = index.facts[step] ?? "";
  draw();
}
const keys = {"/": () => search.focus(),
  ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1),
  Escape: () => { form.reset(); slider.value = at; draw(); }};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
  if (event.key !== "Escape" && event.target.closest("input, select")) return;
  event.preventDefault();
  keys[event.key]();
});
form.addEventListener("input", event => event.target === slider ? go(+slider.value) : draw());
form.addEventListener("submit", async event => {
  event.preventDefault();
  for (let by = 1; by <= index.steps.length; by++) {
    const next = (at + by) % index.steps.length;
    if (pick(await unpack(`step-${index.steps[next]}`)).length) return go(next);
  }
});
unpack("index").then(found => {
  index = found;
  for (const name of ["kind", "ended"])
    for (const each of index[name]) form.elements[name].append(new Option(visible(each), each));
  for (const name of index.rewards)
    for (const [sign, text] of [["0", "is 0"], ["+", "is not 0"]])
      form.elements.reward.append(new Option(visible(`${name} ${text}`), sign + name));
  slider.max = index.steps.length - 1;
  document.documentElement.className = "scripted";
  return go(0);
});
"""
