"""Scores of answers by hand, the exact format against the field's pattern, comparisons."""

import dataclasses
import math
import random
import re

import pytest

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.rows import convert_row
from jaxsft.evaluate.scoring import (
    GeneratedAnswer,
    compare_answers,
    reference_number,
    repeated_share,
    score_answer,
)
from jaxsft.rewards.answer_form import answer_part, exact_parts, format_fault

FORM = AnswerTemplate()
TAGS = FORM.markers
THINK = AnswerTemplate("<think>{reasoning}</think>{answer}")
WORDS = AnswerTemplate("Reasoning: {reasoning}\n\nFinal answer: {answer}")
MIXED = AnswerTemplate("<think>{reasoning}</think>\n\nFinal answer: {answer}")
FIVE = AnswerTemplate("<a> <b>{reasoning}</b>\n<c>{answer}</c> </a>")
GOOD = "<reasoning>Two and two.</reasoning>\n<answer>Four.</answer>"


def summarize(answers: list[GeneratedAnswer]) -> dict[str, float]:
    """The value of every metric, and the number of answers."""
    values = {
        metric.name: estimates[0].value for metric, estimates, _ in compare_answers(FORM, answers)
    }
    return values | {"num_answers": len(answers)}


def answer(
    text: str, reference: str = "r", *, stopped: bool = True, truncated: bool = False
) -> GeneratedAnswer:
    return GeneratedAnswer("p", reference, text, 9, stopped=stopped, truncated=truncated)


def wrapped(text: str) -> str:
    return f"<reasoning>Hm.</reasoning>\n<answer>{text}</answer>"


# (expected, text, exact format, correct, within 10%, last number correct)
T, F = True, False
HAND_MADE = [
    ("72", wrapped("72"), T, T, T, T),
    ("72", wrapped("\n 72 \n"), T, T, T, T),
    ("72", wrapped("72 clips"), T, T, T, T),
    ("72", wrapped("72km, in 3 days"), T, T, T, F),
    ("72", wrapped("The answer is **72**."), T, T, T, T),
    ("72", wrapped("75"), T, F, T, F),
    ("72", wrapped("79.2"), T, F, T, F),  # 1.1 times 72, exactly
    ("72", wrapped("79.21"), T, F, F, F),
    ("72", wrapped("-72"), T, F, F, F),
    ("72", wrapped("seventy-two"), T, F, F, F),
    ("72", wrapped("48 + 24 = 72"), T, F, F, T),  # the first number counts
    ("72", wrapped(r"48 + 24 = \boxed{72}"), T, T, T, T),
    ("72", wrapped(r"\boxed{24}, no: \boxed{72} of 80"), T, T, T, F),
    ("5", wrapped(r"5 apples \boxed{}"), T, T, T, T),  # nothing in the box
    ("7", wrapped(r"7, \boxed{\text{seven}}"), T, T, T, T),
    ("72", wrapped("70-72"), T, F, T, T),
    ("1,234.50", wrapped("$1234.5 in all"), T, T, T, T),
    ("-3", wrapped("-$3"), T, T, T, T),
    ("0.75", wrapped(r"\frac{3}{4} cups"), T, T, T, T),
    ("0", wrapped(".1"), T, F, F, F),  # no ratio to zero
    # The form is broken; a number in the answer counts all the same.
    ("72", f"Sure! {wrapped('72')}", F, T, T, T),
    ("72", f"{wrapped('72')} I hope this helps.", F, T, T, T),
    ("72", "<reasoning>Hm.</reasoning>\n<answer>72", F, T, T, T),
    ("72", "<reasoning>Hm.\n<answer>72</answer>", F, T, T, T),
    ("72", "<reasoning>So <answer>72</answer></reasoning>", F, T, T, T),
    # The pattern of the exact format lets tags stand twice.
    ("72", f"{wrapped('70')}\n<answer>72</answer>", T, F, T, T),  # the first answer counts
    ("72", "<reasoning>Hm.</reasoning><answer><answer>72</answer></answer>", T, T, T, T),
    ("72", "<reasoning>The <answer> tag: 1.</reasoning>\n<answer>72</answer>", T, T, T, T),
    ("72", "<reasoning>Not <answer>1</answer>!</reasoning><answer>72</answer>", T, T, T, T),
    ("72", "<reasoning>So 72.</reasoning>", F, F, F, T),
    ("72", "48/2 = 24. 48 + 24 = 72. The answer is 72.", F, F, F, T),
    ("72", "", F, F, F, F),
]


@pytest.mark.parametrize(("expected", "text", "exact", "correct", "partial", "last"), HAND_MADE)
def test_hand_made_answers(
    expected: str, text: str, exact: bool, correct: bool, partial: bool, last: bool
) -> None:
    scores = score_answer(answer(text, FORM.join("Because.", expected)), FORM)
    found = (scores.exact_format, scores.correct, scores.partial, scores.last_number_correct)
    assert found == (exact, correct, partial, last)


def test_reference_is_read_as_the_converter_writes_it() -> None:
    row = {"question": "How many?", "answer": "1000 + 80 = <<1000+80=1080>>1080\n#### 1,080"}
    conversation = convert_row(row)
    assert reference_number(conversation.turns[-1].content, FORM) == 1080
    assert reference_number(FORM.join("So.", "There are 1,080."), FORM) is None
    assert reference_number("1,080", FORM) == 1080
    assert reference_number("There are 1,080.", FORM) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, None),
        (FORM.join("Because.\nAnd so.", "Four."), None),  # what training teaches
        ("<reasoning>x < y and y > z</reasoning>\nThus:\n<answer><b>4</b></answer>", None),
        (f"Sure! {GOOD}", "text before <reasoning>"),
        (f"{GOOD}<end_of_turn>", "text after </answer>"),
        ("Four.", "no tags"),
        ("<Reasoning>a</Reasoning>\n<answer>b</answer>", "no <reasoning>, </reasoning>"),
        ("<reasoning>a</reasoning>\n<answer>b", "no </answer>"),
        ("<reasoning>a</reasoning>\n<answer></answer>", "nothing between two tags"),
        ("<reasoning>use <answer> here</reasoning>\n<answer>c</answer>", "2 × <answer>"),
        ("<reasoning>a<answer>b</answer></reasoning>", "tags out of order"),
    ],
)
def test_what_breaks_the_format_is_named(text: str, fault: str | None) -> None:
    assert format_fault(text, FORM) == fault


PATTERNS = {
    FORM: r"<reasoning>(.+?)</reasoning>.*?<answer>(.+?)</answer>",  # the field's
    THINK: r"<think>(.+?)</think>(.+?)",
    WORDS: r"Reasoning:(.+?)Final answer:(.+?)",
    FIVE: r"<a>\s*<b>(.+?)</b>.*?<c>(.+?)</c>\s*</a>",
}


@pytest.mark.parametrize("form", PATTERNS, ids=lambda form: form.markers[0])
def test_exact_format_is_the_pattern_of_the_field(form: AnswerTemplate) -> None:
    pattern = re.compile(PATTERNS[form], re.DOTALL)
    # The first of the openings of the answer that no other follows before the answer ends.
    begin, ends = re.escape(form.start_of_answer), [*map(re.escape, form.literals[2][:1]), r"\Z"]
    part = re.compile(f"{begin}((?:(?!{begin}).)*?)(?:{'|'.join(ends)})", re.DOTALL)
    parts, rng, num_exact = [*form.markers, "a", " ", "\n"], random.Random(0), 0
    for _ in range(6_000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 8)))
        if rng.random() < 0.5:
            text = f" {' '.join(form.literals[0])}{text}{''.join(form.literals[2])}\n"
        match = pattern.fullmatch(text.strip())
        assert exact_parts(text, form) == (match and match.groups()), text
        is_good = bool(match) and all(text.count(tag) == 1 for tag in form.markers)
        assert (format_fault(text, form) is None) is is_good, text
        num_exact += bool(match)
        found = part.search(text, text.find(form.end_of_reasoning) + 1) or part.search(text)
        assert answer_part(text, form) == (found and found[1]), text
    assert num_exact > 60
    long = "".join(form.markers) * 20_000  # where the pattern takes cubic time
    assert format_fault(long, form) is not None and answer_part(long, form) is not None
    assert form.split(long) is None and form.split(form.join("r", "a")) == ("r", "a")


@pytest.mark.parametrize(
    ("form", "text", "fault", "number"),
    [
        (THINK, "<think>1 and 1</think>\n\nIt is **2**.", None, 2),
        (MIXED, "<think>1 and 1</think>\nFinal answer: 2", None, 2),
        (MIXED, "<think>1 and 1</think>\n2", "no Final answer:", 2),
        (THINK, "<think>1 and 1</think>", "nothing around </think>", None),
        (THINK, "<think>1 and 1", "no </think>", None),
        (THINK, "It is 2.", "no tags", None),
        (THINK, FORM.join("1", "2"), "no tags", None),  # a form, but not the model's
        (WORDS, "Reasoning: 1 and 1.\n\nFinal answer: 2", None, 2),
        (WORDS, "Finally: 1 answer. Final answer: 2", "no Reasoning:", 2),
        (WORDS, "So: Reasoning: 1 Final answer: 2", "text before Reasoning:", 2),
        (FIVE, "<a>\n<b>1</b> so <c>2</c> </a>", None, 2),
        (FIVE, "<a>x<b>1</b><c>2</c></a>", "nothing between two tags", 2),
    ],
)
def test_answers_of_other_templates(
    form: AnswerTemplate, text: str, fault: str | None, number: int | None
) -> None:
    assert format_fault(text, form) == fault
    scores = score_answer(answer(text, form.join("So.", "2")), form)
    assert scores.exact_format is (fault is None)
    assert scores.correct is (number == 2)


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repeated_share("a b c") is None
    assert repeated_share("a b c d") == 0
    # Runs: abca bcab cabc abca bcab, of which three are different.
    assert repeated_share("a b c a b c a b") == 1 - 3 / 5
    assert repeated_share("no " * 103) == 0.99


ANSWERS = [
    answer("<reasoning>one two three</reasoning>\n<answer>four</answer>"),
    # The same answer but for white space around it, and another turn begun behind it.
    answer("<reasoning>one\ntwo </reasoning>\n<answer> four\n</answer>", stopped=False),
    answer("<reasoning>one two three four</reasoning>\n<answer>five six</answer>"),
    # Not in the form: its words are counted nowhere.
    answer("seven eight nine ten", stopped=False, truncated=True),
]


def test_rates_means_and_counts() -> None:
    assert summarize(ANSWERS) == {
        "exact_format": 0.75,
        "each_tag_once": 0.75,
        "stop_rate": 0.5,
        "truncation_rate": 0.25,
        "repetition": 0,
        "mean_tokens": 9,
        "mean_reasoning_words": 3,
        "mean_answer_words": pytest.approx(4 / 3),
        "distinct_answers": 2,
        "num_answers": 4,
    }


def test_accuracies_are_over_rows_with_a_number() -> None:
    seven = FORM.join("So.", "7")
    texts = [(seven, seven), (wrapped("7.5"), seven), ("It is 7", seven), ("7", "no number")]
    summary = summarize([answer(text, reference) for text, reference in texts])
    assert summary["accuracy"] == 1 / 3
    assert summary["accuracy_partial"] == 2 / 3
    assert summary["accuracy_last_number"] == 2 / 3


def test_nothing_in_the_form_has_no_mean_length() -> None:
    summary = summarize([answer("no"), answer("tags")])
    assert (summary["exact_format"], summary["stop_rate"], summary["distinct_answers"]) == (0, 1, 0)
    assert math.isnan(summary["mean_reasoning_words"]) and math.isnan(summary["repetition"])


def test_two_models_are_compared_on_what_both_have() -> None:
    other = [dataclasses.replace(each, text=GOOD, num_tokens=12, stopped=True) for each in ANSWERS]
    lines = {line.metric.name: line for line in compare_answers(FORM, ANSWERS, other)}
    rate = lines["exact_format"]
    assert [each.value for each in rate.estimates] == [0.75, 1]
    assert rate.difference is not None
    assert (rate.difference.value, rate.difference.num, rate.difference.p_value) == (0.25, 4, 1)
    stops = lines["stop_rate"].difference
    assert stops is not None and (stops.value, stops.p_value) == (0.5, 0.5)  # 2 of 2 one way
    words = lines["mean_reasoning_words"]
    assert [each.num for each in words.estimates] == [3, 4]
    assert words.difference is not None and (words.difference.value, words.difference.num) == (0, 3)
    assert lines["distinct_answers"].difference is None
    assert "accuracy" not in lines
    none = compare_answers(FORM, [answer("no")], [answer(GOOD)])
    assert {line.metric.name: line.difference for line in none}["mean_answer_words"] is None


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no answers"):
        summarize([])
    with pytest.raises(ValueError, match="different prompts"):
        compare_answers(FORM, ANSWERS, ANSWERS[:3])
