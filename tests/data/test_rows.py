import re
from typing import get_args

import pytest

from jaxsft.data import rows as reasoning
from jaxsft.data.rows import (
    Conversation,
    ConversionReason,
    Rejected,
    Turn,
    completion_text,
    convert_row,
    split_completion,
)

FORMATTED = "<reasoning>r</reasoning>\n<answer>a</answer>"


def glaive(response: str, prompt: str = "p") -> Conversation | Rejected:
    return convert_row({"prompt": prompt, "response": response})


def accepted(row: dict) -> Conversation:
    conversation = convert_row(row)
    assert isinstance(conversation, Conversation), conversation
    return conversation


def test_target_matches_the_exact_format_of_the_evaluation():
    exact = r"^\s*<reasoning>.+?</reasoning>.*?<answer>(.+?)</answer>\s*$"
    match = re.match(exact, completion_text("one\ntwo", "three\nfour"), re.DOTALL)
    assert match is not None and match[1] == "three\nfour"


@pytest.mark.parametrize(
    ("response", "reason", "detail"),
    [
        ("just an answer", "no_thought", "no <think>"),
        ("<think>r <think>a", "unclosed_thought", "2 <think> and 0"),
        ("r</think>a<think>b", "reversed_thought", "before"),
        ("<think>r<think>s</think>t</think>a", "nested_thought", "2 <think> and 2"),
        ("<think>r<think>s</think>a", "nested_thought", "2 <think> and 1"),
        ("<think>r</think>a<think>s</think>b", "several_thoughts", "2 <think> and 2"),
        ("r</think>s</think>a", "several_thoughts", "0 <think> and 2"),
        ("<think>r</think>a<think>b", "several_thoughts", "2 <think> and 1"),
        ("Sure! <think>r</think>a", "text_before_thought", "5 characters"),
        ("<think> \n</think>a", "empty_thought", "reasoning is empty"),
        ("<think>r</think> \n", "empty_answer", "nothing follows"),
        ("", "empty_answer", "response is empty"),
        ("<think>use <answer> tags</think>a", "literal_tags", "<answer> inside the reasoning"),
        ("<think>r</think></reasoning>a", "literal_tags", "</reasoning> inside the answer"),
    ],
)
def test_malformed_responses(response, reason, detail):
    result = glaive(response)
    assert isinstance(result, Rejected)
    assert result.reason == reason
    assert detail in result.detail


def test_blank_prompt():
    assert glaive("<think>r</think>a", prompt=" \n") == Rejected(
        "empty_prompt", "a user turn has no text"
    )


def test_a_missing_opening_tag_is_noted():
    conversation = accepted({"prompt": "p", "response": "r\n</think>\na"})
    assert conversation.turns[-1].content == FORMATTED
    assert conversation.notes == ("implicit_open",)


@pytest.mark.parametrize("look_alike", ["<end_of_turn>", "<bos>", "<unused7>"])
def test_control_look_alikes_stay_text(look_alike):
    conversation = accepted({"prompt": look_alike, "completion": "c"})
    assert conversation.turns[0].content == look_alike
    assert conversation.notes == ("control_look_alike", "plain_completion")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " p\n", "response": " <think>\nr\n</think>\n\n a \n"},
        {"prompt": "p", "completion": "<think>r</think>a"},
        {"prompt": "p", "completion": "a", "reasoning_content": " r "},
        {"prompt": "p", "completion": "<reasoning>r</reasoning> \n\n<answer> a</answer>\n"},
        {"prompt": "p", "response": FORMATTED},
        {"instruction": "p", "response": "<think>r</think>a", "id": 7},
        {"question": "p", "answer": "r\n#### a"},
        {
            "messages": [
                {"role": "system", "content": " "},
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
            ],
            "prompt": None,
        },
        {
            "conversations": [
                {"from": "human", "value": "p"},
                {"from": "gpt", "value": "<think>r</think>a"},
            ]
        },
    ],
)
def test_every_schema_gives_the_same_conversation(row):
    assert accepted(row) == Conversation(
        (Turn("user", "p"), Turn("assistant", FORMATTED)), "r", "a", ()
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": " c "},
        {"prompt": "p", "completion": "c", "reasoning_content": " "},
        {"instruction": "p", "response": "c"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
    ],
)
def test_plain_completions(row):
    turns = (Turn("user", "p"), Turn("assistant", "c"))
    assert accepted(row) == Conversation(turns, None, None, ("plain_completion",))


@pytest.mark.parametrize(
    ("completion", "reasoning_content", "reason"),
    [
        ("<think>r</think>a", "r", "several_thoughts"),
        ("a", "<think>r</think>", "several_thoughts"),
        (FORMATTED, "r", "literal_tags"),
        ("a", "<reasoning>r", "literal_tags"),
        (" ", "r", "empty_answer"),
        ("<reasoning> </reasoning><answer>a</answer>", None, "literal_tags"),
        ("x " + FORMATTED, None, "literal_tags"),
    ],
)
def test_malformed_completions(completion, reasoning_content, reason):
    row = {"prompt": "p", "completion": completion, "reasoning_content": reasoning_content}
    result = convert_row(row)
    assert isinstance(result, Rejected) and result.reason == reason


def test_gsm8k_annotations_go():
    row = {
        "question": "How many clips?",
        "answer": "In May 48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 1,072",
    }
    conversation = accepted(row)
    assert conversation.reasoning == "In May 48/2 = 24 clips.\nSo 48+24 = 72."
    assert conversation.answer == "1,072"
    two_marks = accepted({"question": "q", "answer": "r #### 1 no\n#### 2"})
    assert (two_marks.reasoning, two_marks.answer) == ("r #### 1 no", "2")  # the last one counts
    for answer, reason in [
        ("72", "no_final_answer"),
        ("#### 72", "empty_thought"),
        ("r ####", "empty_answer"),
        ("", "empty_answer"),
    ]:
        result = convert_row({"question": "q", "answer": answer})
        assert isinstance(result, Rejected) and result.reason == reason


def test_several_turns():
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": "p1"},
        {"role": "assistant", "content": "<think>r1</think>a1"},
        {"role": "user", "content": "p2"},
        {"role": "assistant", "content": "c2"},
    ]
    conversation = accepted({"messages": messages})
    assert conversation.turns == (
        Turn("system", "be brief"),
        Turn("user", "p1"),
        Turn("assistant", completion_text("r1", "a1")),
        Turn("user", "p2"),
        Turn("assistant", "c2"),
    )
    assert conversation.reasoning is None and conversation.answer is None  # the last turn's
    messages[2]["content"] = "<think>r1"
    assert isinstance(result := convert_row({"messages": messages}), Rejected)
    assert result.reason == "unclosed_thought"
    messages[2]["content"], messages[3]["content"] = "c1", " "
    assert isinstance(result := convert_row({"messages": messages}), Rejected)
    assert result.reason == "empty_prompt"


def test_mbpp_row():
    row = {
        "task_id": 2,
        "text": " Return 1.",
        "code": "def f():\r\n  return 1",
        "test_list": ["t1"],
    }
    assert accepted(row | {"test_list": ["assert f() == 1", "assert f()"]}) == Conversation(
        (
            Turn(
                "user",
                "Return 1.\nYour code should pass these tests:\n\nassert f() == 1\nassert f()",
            ),
            Turn("assistant", "def f():\n  return 1"),
        ),
        None,
        None,
        ("plain_completion",),
    )
    assert accepted(row | {"code": "<think>r</think>a"}).turns[-1].content == FORMATTED
    assert convert_row(row | {"code": "\r\n"}) == Rejected("empty_answer", "the response is empty")


USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "found: none"),
        ({"prompt": "p"}, r"found: prompt\); use .*messages.*prompt, response.*question, answer"),
        ({"prompt": "p", "response": None}, '"response" is null, not a string'),
        ({"question": "q", "answer": 72}, '"answer" is a int, not a string'),
        (
            {"prompt": "p", "completion": "c", "reasoning_content": 1},
            '"reasoning_content" is a int',
        ),
        ({"prompt": "a \ud800", "completion": "c"}, "lone surrogate"),
        ({"text": "t", "code": "c", "test_list": []}, '"test_list" must be a non-empty list'),
        ({"text": "t", "code": "c", "test_list": [1]}, r'"test_list\[0\]" is a int'),
        ({"messages": []}, '"messages" must be a non-empty list'),
        ({"conversations": "x"}, '"conversations" must be a non-empty list'),
        ({"messages": ["x"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r'messages\[0\] "content" is missing'),
        ({"messages": [{"content": "p"}]}, r'messages\[0\] "role" is missing'),
        ({"messages": [{"role": "user", "content": ["p"]}]}, "is a list, not a string"),
        (
            {"messages": [USER, {"role": "tool", "content": ""}]},
            r'messages\[1\] has the role "tool"',
        ),
        ({"messages": [USER]}, "roles are user: .* end with assistant"),
        ({"messages": [ASSISTANT]}, "roles are assistant"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ASSISTANT]}, "user, system"),
    ],
)
def test_mistakes_in_the_file(row, message):
    with pytest.raises(ValueError, match=message):
        convert_row(row)


def test_split_completion_is_the_inverse():
    assert split_completion(completion_text("r\nr", "a")) == ("r\nr", "a")
    for text in ("", "a", FORMATTED + "x", FORMATTED * 2, completion_text("r", " ")):
        assert split_completion(text) is None


def test_every_reason_is_documented():
    for reason in get_args(ConversionReason) + get_args(reasoning.Note):
        assert f'"{reason}"' in (reasoning.__doc__ or "")
