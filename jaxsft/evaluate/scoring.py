r"""Scores of generated answers, and the comparison of two models' answers.

The form of an answer is that of the model's `AnswerTemplate`; its tags are the template's markers.
A number is read in two ways. `final_number` is the first number inside the answer's tags, as in the
field's GRPO demonstrations, or the first in the last `\boxed{}` there. `last_number` is the last
number of the whole text, with or without tags, as GSM8K is scored without a format: this is fair to
a base model, which has never seen the tags.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.intervals import Estimate, PairedDifference, difference, mean, share
from jaxsft.rewards.answer_form import answer_part, exact_parts, has_each_tag_once
from jaxsft.rewards.number_text import find_numbers, parse_number

_NEAR = (Fraction(9, 10), Fraction(11, 10))
_REPEATED_WORDS = 4


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """A generated answer, its prompt and the row's own completion, as text.

    Attributes:
      num_tokens: tokens of the answer, without the stop token.
      stopped: the answer ended at a stop token or the stop text.
      truncated: the answer ended at `max_new_tokens`. Neither where it was cut because the model
        began another turn.
    """

    prompt: str
    reference: str
    text: str
    num_tokens: int
    stopped: bool
    truncated: bool


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """The scores of one answer; None where a score does not apply.

    The numbers of words are None without the exact format. `repetition` is `repeated_share`.
    `correct` (`final_number` equals `reference_number`), `partial` (it is at most 10% off) and
    `last_number_correct` are None where the reference is not a number.
    """

    exact_format: bool
    each_tag_once: bool
    stopped: bool
    truncated: bool
    num_tokens: int
    reasoning_words: int | None
    answer_words: int | None
    repetition: float | None
    correct: bool | None
    partial: bool | None
    last_number_correct: bool | None


class Metric(NamedTuple):
    """What one line of a table or one series of a plot measures.

    `name` is for files and TensorBoard, `label` for people. A "rate" is a share of the answers, a
    "share" a mean of shares. `better`: 1 where more is better, -1 where less is, else 0.
    """

    name: str
    label: str
    unit: Literal["rate", "share", "words", "tokens", "nats", "perplexity", "count", "reward"]
    better: Literal[1, 0, -1]


class Comparison(NamedTuple):
    """A metric of one or two models; the difference (second minus first) is over what both have."""

    metric: Metric
    estimates: Sequence[Estimate]
    difference: PairedDifference | None = None


# Field of AnswerScores -> its mean over the answers, in the order of the table.
_METRICS = {
    "exact_format": Metric("exact_format", "exact format", "rate", 1),
    "each_tag_once": Metric("each_tag_once", "each tag once", "rate", 1),
    "correct": Metric("accuracy", "accuracy", "rate", 1),
    "partial": Metric("accuracy_partial", "accuracy within 10%", "rate", 1),
    "last_number_correct": Metric("accuracy_last_number", "accuracy of last number", "rate", 1),
    "stopped": Metric("stop_rate", "stopped by itself", "rate", 1),
    "truncated": Metric("truncation_rate", "cut off at the limit", "rate", -1),
    "repetition": Metric("repetition", "repeated 4-word runs", "share", -1),
    "num_tokens": Metric("mean_tokens", "tokens", "tokens", 0),
    "reasoning_words": Metric("mean_reasoning_words", "words of reasoning", "words", 0),
    "answer_words": Metric("mean_answer_words", "words of answer", "words", 0),
}
_DISTINCT = Metric("distinct_answers", "distinct answers", "count", 0)
ANSWER_METRICS = (*_METRICS.values(), _DISTINCT)  # in the order of a table
_ACCURACIES = [_METRICS[field] for field in ("correct", "partial", "last_number_correct")]


def final_number(text: str, template: AnswerTemplate) -> Fraction | None:
    r"""The first number of the answer part, of its last `\boxed{}` if any; None without one."""
    part = answer_part(text, template) or ""
    numbers = find_numbers(part.rpartition("\\boxed")[2]) or find_numbers(part)
    return numbers[0] if numbers else None


def last_number(text: str) -> Fraction | None:
    """The last number of the whole text; None without one."""
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def reference_number(reference: str, template: AnswerTemplate) -> Fraction | None:
    """The number that is the whole answer of a row's own completion (GSM8K); None elsewhere."""
    parts = template.split(reference)
    return parse_number(parts[1] if parts else reference)


def repeated_share(text: str) -> float | None:
    """1 - distinct / all runs of four words; None in a text without four words.

    This is seq-rep-4 of Welleck et al. (2019, arXiv:1908.04319, equation 8), over words where
    theirs is over tokens.
    """
    words = text.split()
    num_runs = len(words) - _REPEATED_WORDS + 1
    if num_runs < 1:
        return None
    runs = {tuple(words[begin : begin + _REPEATED_WORDS]) for begin in range(num_runs)}
    return 1 - len(runs) / num_runs


def score_answer(answer: GeneratedAnswer, template: AnswerTemplate) -> AnswerScores:
    """The scores of one answer, which should have the template's form, as its reference has."""
    parts = exact_parts(answer.text, template)
    wanted = reference_number(answer.reference, template)
    given = final_number(answer.text, template)
    return AnswerScores(
        exact_format=parts is not None,
        each_tag_once=has_each_tag_once(answer.text, template),
        stopped=answer.stopped,
        truncated=answer.truncated,
        num_tokens=answer.num_tokens,
        reasoning_words=len(parts[0].split()) if parts else None,
        answer_words=len(parts[1].split()) if parts else None,
        repetition=repeated_share(answer.text),
        correct=None if wanted is None else given == wanted,
        partial=None if wanted is None else _is_near(given, wanted),
        last_number_correct=None if wanted is None else last_number(answer.text) == wanted,
    )


def _is_near(given: Fraction | None, wanted: Fraction) -> bool:
    if given is None or wanted == 0:
        return given == wanted
    return _NEAR[0] <= given / wanted <= _NEAR[1]


def compare_answers(
    template: AnswerTemplate,
    left: Sequence[GeneratedAnswer],
    right: Sequence[GeneratedAnswer] | None = None,
) -> list[Comparison]:
    """Every metric of one model's answers, or of two models' answers to the same prompts.

    The accuracies are left out where no reference is a number. A length is NaN without any answer
    in the exact format; its difference is over the prompts that both models answered in it.

    Raises:
      ValueError: there are no answers, or the two models were asked differently.
    """
    sides = [left] if right is None else [left, right]
    if not all(sides):
        raise ValueError("no answers to score")
    if len({tuple(answer.prompt for answer in side) for side in sides}) > 1:
        raise ValueError("the two models answered different prompts; evaluate both on the same set")
    scores = [[score_answer(answer, template) for answer in side] for side in sides]
    lines = []
    for field, metric in _METRICS.items():
        columns = [[getattr(score, field) for score in side] for side in scores]
        if metric in _ACCURACIES and all(value is None for value in columns[0]):
            continue
        estimator = share if metric.unit == "rate" else mean
        estimates = [estimator([x for x in column if x is not None]) for column in columns]
        pairs = [pair for pair in zip(*columns, strict=True) if None not in pair]
        gain = difference(*zip(*pairs, strict=True)) if right is not None and pairs else None
        lines.append(Comparison(metric, estimates, gain))
    distinct = []  # the number of different answer parts among the answers in the exact format
    for side in sides:
        exact = [exact_parts(each.text, template) for each in side]
        found = {parts[1].strip() for parts in exact if parts}
        distinct.append(Estimate(len(found), math.nan, math.nan, len(side)))
    return [*lines, Comparison(_DISTINCT, distinct)]
