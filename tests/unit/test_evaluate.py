"""The form of answers, counted by hand; the way from a sample to its prompt and completion."""

import dataclasses
import math

import numpy as np
import pytest
from fake_tokenizer import FakeTokenizer

from jaxsft.chat import encode_chat, encode_prompt
from jaxsft.evaluate import Answer, is_exact_format, score_format, split_prompt, user_text
from jaxsft.reasoning import Turn, completion_text

GOOD = "<reasoning>Two and two.</reasoning>\n<answer>Four.</answer>"


def answer(text: str, *, stopped: bool = True) -> Answer:
    return Answer(prompt="p", reference="r", text=text, stopped=stopped)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (GOOD, True),
        ("<reasoning>a</reasoning><answer>b</answer>", True),
        # White space around the whole, newlines inside the parts, text between the parts.
        (f" \n{GOOD}\n ", True),
        ("<reasoning>a\n\nb</reasoning>\n<answer>1.\n2.\n</answer>", True),
        ("<reasoning>a</reasoning>\nThus:\n<answer>b</answer>", True),
        ("<reasoning>x < y and y > z</reasoning>\n<answer><b>4</b></answer>", True),
        # Text in front of, or after, the whole.
        (f"Sure! {GOOD}", False),
        (f"{GOOD} I hope this helps.", False),
        (f"{GOOD}<end_of_turn>", False),
        # Something is missing.
        ("", False),
        ("Four.", False),
        ("<reasoning>a</reasoning>\nb", False),
        ("<answer>b</answer>", False),
        ("a</reasoning>\n<answer>b</answer>", False),
        ("<reasoning>a\n<answer>b</answer>", False),
        ("<reasoning>a</reasoning>\n<answer>b", False),
        ("<reasoning>a</reasoning>\nb</answer>", False),
        ("<reasoning></reasoning>\n<answer>b</answer>", False),
        ("<reasoning>a</reasoning>\n<answer></answer>", False),
        # Tags twice, nested, in the wrong order, spelt otherwise.
        (f"{GOOD}\n{GOOD}", False),
        ("<reasoning>a<reasoning>b</reasoning>\n<answer>c</answer>", False),
        ("<reasoning>a</reasoning>b</reasoning>\n<answer>c</answer>", False),
        ("<reasoning>a</reasoning>\n<answer>b<answer>c</answer>", False),
        ("<reasoning>a</reasoning>\n<answer>b</answer>\n<answer>c</answer>", False),
        ("<reasoning>use <answer> here</reasoning>\n<answer>c</answer>", False),
        ("<answer>b</answer>\n<reasoning>a</reasoning>", False),
        ("<reasoning>a<answer>b</answer></reasoning>", False),
        ("<Reasoning>a</Reasoning>\n<answer>b</answer>", False),
        ("<think>a</think>\n<answer>b</answer>", False),
        ("<reasoning >a</reasoning>\n<answer>b</answer>", False),
    ],
)
def test_exact_format(text: str, exact: bool) -> None:
    assert is_exact_format(text) is exact


def test_what_training_teaches_is_exact() -> None:
    assert is_exact_format(completion_text("Because.\nAnd so.", "Four."))


def test_rates_means_and_distinct_answers() -> None:
    report = score_format(
        [
            answer("<reasoning>one two three</reasoning>\n<answer>four</answer>"),
            # The same answer but for white space around it, and not stopped.
            answer("<reasoning>one\ntwo </reasoning>\n<answer> four\n</answer>", stopped=False),
            answer("<reasoning>one two three four</reasoning>\n<answer>five six</answer>"),
            # Not in the form: its words are counted nowhere.
            answer("seven eight nine ten", stopped=False),
        ]
    )
    assert dataclasses.asdict(report) == {
        "num_answers": 4,
        "exact_format": 0.75,
        "stop_rate": 0.5,
        "mean_reasoning_words": 3.0,
        "mean_answer_words": pytest.approx(4 / 3),
        "distinct_answers": 2,
    }


def test_nothing_in_the_form_has_no_mean_length() -> None:
    report = score_format([answer("no"), answer("tags")])
    assert (report.exact_format, report.stop_rate, report.distinct_answers) == (0, 1, 0)
    assert math.isnan(report.mean_reasoning_words) and math.isnan(report.mean_answer_words)


def test_no_answers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        score_format([])


TURNS = {
    "one turn": [Turn("user", "Why?")],
    "system": [Turn("system", "Think."), Turn("user", "Why?")],
    "several turns": [
        Turn("system", "Think."),
        Turn("user", "Who?"),
        Turn("assistant", "I."),
        Turn("user", "Why?"),
    ],
    "turn tokens as text": [Turn("user", "What does <end_of_turn> mean?")],
}


@pytest.mark.parametrize("name", TURNS)
def test_split_prompt_is_where_generation_begins(name: str) -> None:
    tokenizer, turns = FakeTokenizer(), TURNS[name]
    sample = encode_chat(tokenizer, [*turns, Turn("assistant", GOOD)])
    prompt, completion = split_prompt(sample)
    assert prompt == encode_prompt(tokenizer, turns)
    assert completion == [*tokenizer.encode(GOOD), tokenizer.end_of_turn_id]
    assert all(type(token) is int for token in prompt + completion)
    assert prompt + completion == sample.ids.tolist()
    assert np.array_equal(np.flatnonzero(sample.loss_mask)[-len(completion) :][0], len(prompt))


@pytest.mark.parametrize(
    ("name", "text"),
    [("one turn", "Why?"), ("system", "Think.\n\nWhy?"), ("several turns", "Why?")],
)
def test_user_text_is_the_last_user_turn(name: str, text: str) -> None:
    tokenizer = FakeTokenizer()
    assert user_text(tokenizer.decode(encode_prompt(tokenizer, TURNS[name]))) == text
