"""The rollouts of a run on one page: any step's groups side by side, with filters and curves.

The completions of a step are a compressed block, which the page's script opens when the step is
shown. It puts their texts in as text; what stands in the page itself goes through `html.escape`.
"""

import base64
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxsft.common.files import write_text
from jaxsft.common.page_style import html_page
from jaxsft.common.text import plural, visible_line
from jaxsft.grpo.alarms import Alarms
from jaxsft.run.metrics import logged_metrics

_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "prompt", "member", "num_tokens"), (int,)),
    **dict.fromkeys(("text", "source", "kind", "question", "ended"), (str,)),
    **dict.fromkeys(("log_prob", "reward", "advantage"), _NUMBER),
    **{"rewards": (dict,), "counted": (bool,)},
}
_NEEDED = ("step", "prompt", "member", "text")  # a line without one of them cannot be shown
_OF_GROUP = ("prompt", "source", "kind", "question")
_SHARES = ("right", "format", "dead groups", "truncated")
_CURVES = ("reward", *_SHARES, "completion tokens", "reasoning words", "kl", "entropy")
_WIDTH, _HEIGHT = 200, 56  # of a curve

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
    rollouts = _Rollouts(path)
    if not rollouts.blocks:
        raise ValueError(f"{path}: has no completion yet; wait for the run's first rollout")
    steps = sorted(rollouts.blocks)
    kept = _evenly(steps, [len(rollouts.blocks[step]) for step in steps], max_bytes)
    notes = [f"{plural(len(steps), 'rollout')}, each by the first step that it served."]
    if len(kept) < len(steps):
        notes.append(
            f"{len(kept):,} of them are here, evenly spaced, to keep this page below "
            f"{max_bytes / 10**6:.0f} MB; rollouts.jsonl has all."
        )
    title = f"Rollouts of {visible_line(run_dir.absolute().name)}"
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    for line in logged_metrics(run_dir):
        metrics[line["step"]] |= _values(line)
    about = escape(" ".join([*notes, *rollouts.notes]))
    body = [
        f"<header><h1>{escape(title)}</h1><p>{about}</p></header>",
        _warnings(run_dir),
        _curves(metrics),
        _FORM,
        *(rollouts.blocks[step] for step in kept),
        _packed("index", rollouts.index(kept, metrics)),
    ]
    page = run_dir / "rollouts.html"
    write_text(page, html_page(title, body, script=_SCRIPT))
    return page


class _Rollouts:
    """What rollouts.jsonl has.

    Attributes:
      blocks: each step's completions, as an element of the page.
      notes: what is wrong with the file, a sentence each.
    """

    def __init__(self, path: Path) -> None:
        self._names: dict[str, set[str]] = {"kind": set(), "ended": set(), "rewards": set()}
        self._recurs: dict[str, set[int]] = defaultdict(set)  # a question's steps
        self.blocks: dict[int, str] = {}
        self._bad: Counter[str] = Counter()  # lines, by what is wrong with them
        twice = 0
        with path.open("rb") as file:
            for step, rows in groupby(self._rows(file), key=lambda row: row["step"]):
                twice += step in self.blocks
                self.blocks[step] = self._block(step, list(rows))
        self.notes = [f"{plural(num, 'line')} {why}." for why, num in self._bad.items()]
        if twice:
            self.notes.append(f"{plural(twice, 'step')} came again: the last lines are here.")

    def _rows(self, file: Iterable[bytes]) -> Iterator[Row]:
        for line in file:
            row = _row(line)
            self._bad.update(f"without “{name}”" for name in row if row[name] is None)
            if row:
                yield row
            else:
                self._bad["that cannot be read"] += 1

    def _block(self, step: int, rows: Sequence[Row]) -> str:
        groups: dict[int, Row] = {}
        for row in rows:
            row["rewards"] = row["rewards"] or {}
            self._names["rewards"].update(row["rewards"])
            for name in ("kind", "ended"):
                self._names[name].update(filter(None, [row[name]]))
            group = {name: row.pop(name) for name in _OF_GROUP} | {"members": []}
            groups.setdefault(group["prompt"], group)["members"].append(row)
        for group in groups.values():
            rewards = [member["reward"] or 0.0 for member in group["members"]]
            group["live"] = max(rewards) - min(rewards) > 1e-8  # as the loop has it
            group["key"] = f"{zlib.crc32(json.dumps(group['question']).encode()):x}"
            self._recurs[group["key"]].add(step)
        return _packed(f"step-{step}", list(groups.values()))

    def index(self, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]]) -> Row:
        """What the script knows before it opens a step: the names, and of these steps the rest."""
        recurs = {key: sorted(each & {*steps}) for key, each in self._recurs.items()}
        facts = {
            step: " · ".join(
                f"{n} {_shown(n, v)}" for n, v in metrics[step].items() if n in _CURVES
            )
            for step in steps
            if step in metrics
        }
        return {
            **{name: sorted(each) for name, each in self._names.items()},
            **{"steps": steps, "facts": facts},
            "recurs": {key: each for key, each in recurs.items() if len(each) > 1},
        }


def _row(line: bytes) -> Row:
    """The fields of a line, each of its type or None; {} for a line that cannot be shown."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    row = {name: _typed(values.get(name), types) for name, types in _TYPES.items()}
    if any(row[name] is None for name in _NEEDED):
        return {}
    for name, each in (row["rewards"] or {}).items():
        parts = each if isinstance(each, dict) else {}
        value, reason = parts.get("value"), parts.get("reason")
        row["rewards"][name] = [_typed(value, _NUMBER), _typed(reason, (str,))]
    return row


def _typed(value: Any, types: tuple[type, ...]) -> Any:
    """The value if it is of one of these types, and finite; otherwise None."""
    is_good = type(value) in types and (type(value) not in _NUMBER or abs(value) < 1e300)
    return value if is_good else None


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


def _values(line: Row) -> dict[str, float]:
    """What is drawn of a line of metrics: _CURVES, each reward, what is held out."""
    values = {}
    for name, value in line.items():
        short = name.removeprefix("train/").replace("_", " ")
        is_drawn = name.startswith(("train/reward_", "eval/reward", "eval/right", "eval/tests_"))
        if _typed(value, _NUMBER) is not None and (short in _CURVES or is_drawn):
            values[short] = value
    values.pop("reward s", None)  # seconds
    return values


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name.removeprefix("eval/") in _SHARES else f"{value:.4g}"


def _warnings(run_dir: Path) -> str:
    said = Alarms().replay(run_dir)
    items = "".join(f"<li>step {step}: {escape(warning)}</li>" for step, warning in said)
    return f'<section class="card"><h2>Warnings</h2><ul>{items}</ul></section>' if said else ""


def _curves(metrics: Mapping[int, Mapping[str, float]]) -> str:
    points: dict[str, dict[int, float]] = {name: {} for name in _CURVES}
    for step, values in metrics.items():
        for name, value in values.items():
            points.setdefault(name, {})[step] = value
    first, last = min(metrics, default=0), max(metrics, default=0)
    figures = [_curve(name, each, first, last) for name, each in points.items() if len(each) > 1]
    data = f'data-first="{first}" data-last="{last}"'
    return f'<section class="card curves" {data}>{"".join(figures)}</section>' if figures else ""


def _curve(name: str, points: Mapping[int, float], first: int, last: int) -> str:
    """One curve as inline SVG, of means where its steps are closer than its units."""
    at: dict[int, list[float]] = defaultdict(list)
    for step, value in points.items():
        at[(step - first) * _WIDTH // (last - first)].append(value)
    means = {x: math.fsum(values) / len(values) for x, values in sorted(at.items())}
    low, high = min(means.values()), max(means.values())
    scale = (_HEIGHT - 8) / ((high - low) or 1.0)
    line = "L".join(f"{x} {4 + (high - mean) * scale:.1f}" for x, mean in means.items())
    label = escape(visible_line(name))
    return (
        f"<figure><figcaption>{label} <b>{_shown(name, value)}</b> "
        f"<small>{_shown(name, low)} to {_shown(name, high)}</small></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><path d="M{line}"/><path class="cursor" d="M0 0V{_HEIGHT}"/>'
        "</svg></figure>"
    )


_FORM = """<p class="unscripted">The rollouts need a browser of 2023 or later, with scripts.</p>
<form class="filters"><p><label for="at">Step <b id="now"></b></label>
<input type="range" id="at" min="0" value="0"><small><kbd>←</kbd> <kbd>→</kbd> step
<kbd>j</kbd> <kbd>k</kbd> group <kbd>/</kbd> search <kbd>Esc</kbd> clear</small></p>
<p><select name="kind" aria-label="Kind"><option value="">any kind</option></select>
<select name="live" aria-label="Groups"><option value="">live and dead groups</option>
<option value="live">live groups</option><option value="dead">dead groups</option></select>
<select name="ended" aria-label="End"><option value="">any end</option></select>
<select name="reward" aria-label="Reward"><option value="">any reward</option></select>
<select name="sort" aria-label="Order"><option value="">as drawn</option>
<option value="-1">highest reward first</option><option value="1">lowest reward first</option>
</select><input type="search" id="search" placeholder="Search the texts" aria-label="Search">
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
const number = value => value === null ? "–" : String(+value.toFixed(3));
const sum = values => values.reduce((total, each) => total + each, 0);
const mean = members => sum(members.map(each => each.reward)) / members.length;

function side(member) {
  const badge = (isGood, text) =>
    make("span", `badge ${isGood ? "good" : "bad"}`, visible(text));
  const badges = Object.entries(member.rewards).map(([name, [value, reason]]) =>
    badge(value > 0, `${name} ${number(value)}${reason ? ": " + reason : ""}`));
  if (member.ended) badges.push(badge(member.ended === "stop", `end: ${member.ended}`));
  const out = member.counted === false ? ", not in the loss" : "";
  const facts = `${number(member.num_tokens)} tokens, log p ${number(member.log_prob)}${out}`;
  return make("section", "",
    make("h3", "", `reward ${number(member.reward)}, advantage ${number(member.advantage)}`),
    make("p", "badges", ...badges, make("small", "", facts)), shown(member.text));
}
function article(group, members) {
  const facts = [group.kind, group.live ? "live" : "dead", group.source].filter(Boolean);
  const card = make("article", "card", make("h2", "", String(group.prompt)),
    make("div", "prompt", make("small", "", visible(facts.join(" · "))),
      shown(group.question ?? "")), make("div", "sides", ...members.map(side)));
  card.tabIndex = -1;
  const steps = (index.recurs[group.key] ?? []).filter(step => step !== index.steps[at]);
  if (steps.length && group.question) {
    const other = make("div", "sides"), choice = make("select", "",
      new Option("the same question in …", ""), ...steps.map(x => new Option(`step ${x}`, x)));
    choice.addEventListener("change", async () => {
      const found = choice.value ? await unpack(`step-${choice.value}`) : [];
      other.replaceChildren(...found.filter(each => each.question === group.question)
        .flatMap(each => each.members).map(side));
    });
    card.append(make("div", "sides", choice), other);
  }
  return card;
}
function pick(groups) {
  const {kind, live, ended, reward, sort} = form.elements;
  const words = search.value.toLowerCase(), name = reward.value.slice(1);
  const fits = (group, member) => (!ended.value || member.ended === ended.value)
    && (!name || (name in member.rewards
      && (member.rewards[name][0] === 0) === (reward.value[0] === "0")))
    && `${member.text}\n${group.question ?? ""}`.toLowerCase().includes(words);
  const found = groups
    .filter(group => !kind.value || group.kind === kind.value)
    .filter(group => !live.value || group.live === (live.value === "live"))
    .map(group => [group, group.members.filter(member => fits(group, member))])
    .filter(([, members]) => members.length);
  if (sort.value) {
    for (const [, members] of found) members.sort((a, b) => sort.value * (a.reward - b.reward));
    found.sort(([, a], [, b]) => sort.value * (mean(a) - mean(b)));
  }
  return found;
}
function draw() {
  const found = pick(groups);
  $("groups").replaceChildren(...found.map(each => article(...each)));
  form.querySelector("output").textContent =
    `${sum(found.map(each => each[1].length))} of ${sum(groups.map(g => g.members.length))} ` +
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
  for (const cursor of document.querySelectorAll(".cursor")) {
    const {first, last} = cursor.closest(".curves").dataset;
    cursor.setAttribute("transform", `translate(${200 * (step - first) / (last - first)})`);
  }
  draw();
}
function walk(by) {
  const cards = [...document.querySelectorAll("article")];
  const here = cards.indexOf(document.activeElement.closest("article"));
  const next = here < 0 ? cards[0] : cards[here + by];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView(); }
}
const keys = {"/": () => search.focus(), j: () => walk(1), k: () => walk(-1),
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
