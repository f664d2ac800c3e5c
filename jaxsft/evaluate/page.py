"""The answers of one or two models on one page: side by side for each prompt, with filters.

Every text of a model, of data or of a file name goes through `html.escape`.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from html import escape
from itertools import takewhile, zip_longest
from typing import NamedTuple

from jaxsft.common.page_style import html_page
from jaxsft.common.text import visible_line, visible_text
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.intervals import Estimate, PairedDifference
from jaxsft.evaluate.rewarded import is_right
from jaxsft.evaluate.scoring import (
    AnswerScores,
    Comparison,
    GeneratedAnswer,
    Metric,
    final_number,
    score_answer,
)
from jaxsft.evaluate.table import show_interval, show_p_value, show_value
from jaxsft.evaluate.tasks import ScoredAnswers
from jaxsft.rewards.answer_form import answer_part, format_fault
from jaxsft.rewards.records import Reward

_NOTE = "In brackets: 95% intervals (of rates Wilson's, else the percentile bootstrap)."
_PAIRED_NOTE = (
    " p: paired permutation test by sign flips, for rates the exact McNemar test; not corrected "
    "for the number of lines."
)


# By which answers are correct, of one model or of two.
_KINDS: dict[tuple[bool | None, ...], str] = {
    (True,): "right",
    (False,): "wrong",
    (True, True): "both-right",
    (True, False): "only-first-right",
    (False, True): "only-second-right",
    (False, False): "none-right",
}


class _Row(NamedTuple):
    """The answers to one prompt, their scores and, if measured, what each earns and whether its
    tests pass; `kinds` are the filters that show this row."""

    answers: Sequence[GeneratedAnswer]
    scores: Sequence[AnswerScores]
    earned: Sequence[tuple[Mapping[str, Reward], bool | None]]
    kinds: frozenset[str]


def compare_page(
    title: str,
    names: Sequence[str],
    answers: Sequence[Sequence[GeneratedAnswer]],
    table: Sequence[Comparison],
    template: AnswerTemplate,
    *,
    about: str = "",
    scored: Sequence[ScoredAnswers] = (),
) -> str:
    """The whole page, as HTML in UTF-8.

    Args:
      title: of the page.
      names: of the one or two models.
      answers: each model's, to the same prompts in the same order.
      table: the lines of the summary: losses, and those of `compare_answers`.
      template: the form that the answers should have.
      about: a line below the title, such as the data and the decoding options.
      scored: what each model's answers earn; nothing where no rewards are measured.
    """
    assert 1 <= len(names) <= 2 and len(names) == len(answers)
    title, about, *names = map(visible_line, (title, about, *names))
    earned = [list(zip(each.rewards, each.passed, strict=True)) for each in scored]
    rows = [
        _row(each, [side[number] for side in earned], template)
        for number, each in enumerate(zip(*answers, strict=True))
    ]
    common = _common_beginning([row.answers[0].prompt for row in rows])
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>",
        _table(names, table),
        _filters(names, rows),
    ]
    if common:
        body.append(
            '<details class="card"><summary>Every prompt begins with the same '
            f'{len(common.split()):,} words</summary><div class="text">{_shown(common)}</div>'
            "</details>"
        )
    body += [
        _article(number, row, names, len(common), template) for number, row in enumerate(rows, 1)
    ]
    return html_page(title, body, script=_SCRIPT)


def _row(
    answers: Sequence[GeneratedAnswer],
    earned: Sequence[tuple[Mapping[str, Reward], bool | None]],
    template: AnswerTemplate,
) -> _Row:
    scores = [score_answer(answer, template) for answer in answers]
    correct = tuple(score.correct for score in scores)
    if None in correct and earned:  # no number: tests, or words
        correct = tuple(
            is_right(rewards) if passed is None else passed for rewards, passed in earned
        )
    kinds = {_KINDS[correct]} if correct in _KINDS else set()
    pairs = zip(answers, scores, strict=True)
    if len({_said(answer, score, template) for answer, score in pairs}) > 1:
        kinds.add("differ")
    if any(format_fault(answer.text, template) for answer in answers):
        kinds.add("format-broken")
    if any(score.truncated for score in scores):
        kinds.add("cut-off")
    return _Row(answers, scores, earned, frozenset(kinds))


def _said(
    answer: GeneratedAnswer, score: AnswerScores, template: AnswerTemplate
) -> Fraction | str | None:
    """What is compared to tell whether two answers differ: the number if it counts, or the text."""
    if score.correct is not None:
        return final_number(answer.text, template)
    part = answer_part(answer.text, template)
    return answer.text if part is None else part.strip()


def _common_beginning(prompts: Sequence[str]) -> str:
    """The paragraphs that all prompts begin with, such as the system text; "" for one prompt."""
    if len(prompts) < 2:
        return ""
    paragraphs = zip(*(prompt.split("\n\n")[:-1] for prompt in prompts), strict=False)
    common = takewhile(lambda each: len(set(each)) == 1, paragraphs)
    return "".join(f"{each[0]}\n\n" for each in common)


def _filters(names: Sequence[str], rows: Sequence[_Row]) -> str:
    """The form that the script listens to: every filter that shows any rows, with their number."""
    labels = {
        "all": "all",
        "right": "right",
        "wrong": "wrong",
        "only-first-right": f"only {names[0]} right",
        "only-second-right": f"only {names[-1]} right",
        "both-right": "both right",
        "none-right": "neither right",
        "differ": "answers differ",
        "format-broken": "format broken",
        "cut-off": "cut off",
    }
    pills = []
    for kind, label in labels.items():
        num = len(rows) if kind == "all" else sum(kind in row.kinds for row in rows)
        if num:
            checked = " checked" if kind == "all" else ""
            pills.append(
                f'<label><input type="radio" name="show" value="{kind}"{checked}>'
                f"<span>{escape(label)} <b>{num:,}</b></span></label>"
            )
    return (
        '<form class="filters"><fieldset><legend>Show</legend>'
        f"{''.join(pills)}</fieldset>"
        '<p><input type="search" id="search" placeholder="Search the texts" aria-label="Search">'
        "<output></output><small><kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> next, previous "
        "<kbd>Esc</kbd> clear</small></p></form>"
    )


def _table(names: Sequence[str], table: Sequence[Comparison]) -> str:
    columns, note = list(names), _NOTE
    if len(names) == 2:
        columns, note = [*names, "difference", "p"], _NOTE + _PAIRED_NOTE
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for metric, estimates, difference in table:
        cells = [
            f'<td data-name="{escape(name)}">{_estimate(metric, each)}</td>'
            for name, each in zip(names, estimates, strict=True)
        ]
        if len(names) == 2:
            cells += _difference(metric, difference)
        lines.append(f'<tr><th scope="row">{escape(metric.label)}</th>{"".join(cells)}</tr>')
    return (
        f'<section class="card"><table class="metrics"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table><p class="note">{note}</p></section>'
    )


def _estimate(metric: Metric, estimate: Estimate) -> str:
    """The value, its interval, and for shares both drawn on a line from 0 to 100%."""
    shown = f"<b>{show_value(estimate.value, metric.unit)}</b>"
    interval = f" <i>{show_interval(estimate, metric.unit)}</i>"
    if metric.unit not in ("rate", "share") or math.isnan(estimate.value):
        return shown + interval
    low, high = (
        estimate.value if math.isnan(bound) else bound for bound in (estimate.low, estimate.high)
    )
    return (
        f'{shown}{interval}<span class="track">'
        f'<span style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></span>'
        f'<b style="left:{100 * estimate.value:.2f}%"></b></span>'
    )


def _difference(metric: Metric, difference: PairedDifference | None) -> list[str]:
    if difference is None:
        return ["<td></td>", "<td></td>"]
    gain = difference.value * metric.better
    verdict = ""
    if gain and difference.p_value < 0.05:
        verdict = '<em class="good">better</em>' if gain > 0 else '<em class="bad">worse</em>'
    shown = show_value(difference.value, metric.unit, signed=True)
    interval = show_interval(difference, metric.unit, signed=True)
    return [
        f'<td data-name="difference"><b>{shown}</b> <i>{interval}</i> {verdict}</td>',
        f'<td data-name="p">{escape(show_p_value(difference.p_value))}</td>',
    ]


def _article(
    number: int, row: _Row, names: Sequence[str], num_common: int, template: AnswerTemplate
) -> str:
    first = row.answers[0]
    parts = template.split(first.reference)
    expected = "The row's own answer"
    if row.scores[0].correct is not None:
        expected = f"Expected <b>{_shown(parts[1] if parts else first.reference)}</b>"
    shown = zip_longest(names, row.answers, row.scores, row.earned)
    sides = "".join(_side(*each, template=template) for each in shown)
    kinds = " ".join(sorted(row.kinds))
    return (
        f'<article class="card" id="prompt-{number}" tabindex="-1" aria-label="Prompt {number}" '
        f'data-kinds="{kinds}">'
        f'<h2>{number}</h2><div class="prompt">'
        f'<div class="text">{_shown(first.prompt[num_common:])}</div>'
        f"<details><summary>{expected}</summary>"
        f'<div class="text">{_coloured(first.reference, template)}</div></details></div>'
        f'<div class="sides">{sides}</div></article>'
    )


def _side(
    name: str,
    answer: GeneratedAnswer,
    score: AnswerScores,
    earned: tuple[Mapping[str, Reward], bool | None] | None,
    *,
    template: AnswerTemplate,
) -> str:
    rewards, passed = earned or ({}, None)
    badges = []
    if passed is not None:
        badges.append(_badge("good", "✓ tests") if passed else _badge("bad", "✗ tests"))
    if score.correct is not None:
        number = final_number(answer.text, template)
        given = "no number" if number is None else _number(number)
        badges.append(
            _badge("good", f"✓ {given}") if score.correct else _badge("bad", f"✗ {given}")
        )
        if not score.correct and score.partial:
            badges.append(_badge("near", "within 10%"))
        if not score.correct and score.last_number_correct:
            badges.append(_badge("near", "last number is right"))
    fault = format_fault(answer.text, template)
    badges.append(_badge("bad", f"✗ format: {fault}") if fault else _badge("good", "✓ format"))
    if score.truncated:
        badges.append(_badge("bad", "✂ cut off"))
    facts = f"{answer.num_tokens:,} tokens"
    if score.repetition:
        facts += f", {show_value(score.repetition, 'share')} repeated"
    reasons = "".join(
        f"<br><small>{_shown(f'{name} {reward.value:.4g}: {reward.reason}')}</small>"
        for name, reward in rewards.items()
    )
    return (
        f'<section><h3>{escape(name)}</h3><p class="badges">{"".join(badges)}<small>{facts}</small>'
        f'{reasons}</p><div class="text">{_coloured(answer.text, template)}</div></section>'
    )


def _badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _number(number: Fraction) -> str:
    """As a decimal if that is exact, otherwise as a fraction."""
    decimal = f"{float(number):.12g}"
    return decimal if Fraction(decimal) == number else str(number)


def _coloured(text: str, template: AnswerTemplate) -> str:
    """The text as HTML, its tags, reasoning, answer and the rest each in a class of its own."""
    pieces = list(template.pieces([text]))
    has_tags, shown = any(piece.is_marker for piece in pieces), []
    for piece in pieces:
        if piece.is_marker:
            shown.append(f'<span class="tag {piece.part}">{escape(piece.text)}</span>')
        else:
            outside = "outside" if has_tags else "untagged"
            kind = outside if piece.part == "text" else piece.part
            shown.append(f'<span class="{kind}">{_shown(piece.text)}</span>')
    return "".join(shown) or "<em>nothing</em>"


def _shown(text: str) -> str:
    """The text as HTML, with invisible characters made visible."""
    return escape("\n".join(visible_text(line) for line in text.split("\n")))


_SCRIPT = """
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
