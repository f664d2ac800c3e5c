"""What becomes of a row: every accepted form, every reason, and no text dropped without a word."""

import copy
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.data import messages, replies
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.fields import UNREAD, Repeated, is_harmless, is_wanted
from jaxsft.data.replies import ConversionReason, Rejected
from jaxsft.data.rows import Conversation, RowOptions, Turn, convert_prompt, convert_row

FORMATTED = "<reasoning>r</reasoning>\n<answer>a</answer>"
P, A = Turn("user", "p"), Turn("assistant", FORMATTED)
THOUGHT = "<think>r</think>a"


def accepted(row: Any, **options: Any) -> Conversation:
    conversation = convert_row(row, RowOptions(**options))
    assert isinstance(conversation, Conversation), conversation
    return conversation


def rejected(row: Any, **options: Any) -> Rejected:
    result = convert_row(row, RowOptions(**options))
    assert isinstance(result, Rejected), result
    return result


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """Messages of user and assistant in turn; `more` goes into the last one."""
    found = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    return {"messages": [*found[:-1], found[-1] | more]}


FORMS = {
    "prompt, response": {"prompt": " p\n", "response": " <think>\nr\n</think>\n\n a \n"},
    "prompt, completion": {"prompt": "p", "completion": THOUGHT},
    "in the template's form": {"prompt": "p", "response": "<reasoning>r</reasoning> <answer> a"
                               "</answer>\n"},
    "reasoning_content": {"prompt": "p", "completion": "a", "reasoning_content": " r "},
    "instruction, response": {"instruction": "p", "response": THOUGHT, "id": 7},
    "Alpaca": {"instruction": "p", "input": "", "output": THOUGHT},
    "input, output": {"input": "p", "output": THOUGHT},
    "problem, solution": {"problem": "p", "solution": THOUGHT},
    "query, response": {"query": "p", "response": THOUGHT},
    "question, reasoning, answer": {"question": "p", "reasoning": "r", "answer": "a"},
    "question, thinking, answer": {"question": "p", "thinking": "r", "answer": "a #### b"[:1]},
    "GSM8K": {"question": "p", "answer": "r\n#### a"},
    "lists of messages": {
        "prompt": [{"role": "user", "content": "p"}],
        "completion": [{"role": "assistant", "content": THOUGHT}],
    },
    "messages": chat("p", "a", reasoning_content="r") | {"prompt": None},
    "reasoning beside content": chat("p", "a", reasoning="r", reasoning_content=None),
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": THOUGHT}]
    },
    "blank system": {
        "messages": [{"role": "system", "content": " "}, *chat("p", THOUGHT)["messages"]]
    },
    "text parts": {
        "messages": [
            {"role": "User", "content": [{"type": "text", "text": "p", "image": None}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "r"},
                                              {"type": "text", "text": "a"}]},
        ]
    },
    "the same text twice": {**chat("p", THOUGHT), "instruction": "p", "response": THOUGHT},
    "the answer in a column": {**chat("p"), "reasoning": "r", "answer": "a", "model": "m"},
    "the thought twice": {"prompt": "p", "completion": THOUGHT, "reasoning": "r"},
    "tags around a field": {"prompt": "p", "completion": "a", "thinking": "<think>r</think>"},
    "a switch": {"prompt": "p", "response": THOUGHT, "reasoning": "on", "thinking": True},
    "blank before the real one": {"prompt": "", "instruction": "p", "response": " ",
                                  "output": THOUGHT, "messages": [], "reasoning_content": ""},
    "GSM8K with a blank reasoning": {"question": "p", "answer": "r\n#### a", "reasoning": ""},
    "prompt written out": {"instruction": "p", "output": THOUGHT, "prompt": f"Q: p A: {THOUGHT}"},
    "a mark of an editor": {"prompt": "p", "response": "\ufeff" + THOUGHT},
    "two names, one thought": chat("p", "a", reasoning="r", reasoning_content="r"),
    "written out as text": {"instruction": "p", "output": THOUGHT, "text": f"Q: p A: {THOUGHT}"},
    "harmless fields": {"prompt": "p", "response": THOUGHT, "source": "x", "score": float("nan"),
                        "meta": Repeated(({}, {})), "other": UNREAD, "loss": [], "verified": True,
                        "weight": "1", "train": "true"},
    "begin_of_thought": {"prompt": "p", "response": "<|begin_of_thought|>\nr<|end_of_thought|>\n\n"
                         "<|begin_of_solution|>a<|end_of_solution|>"},
    "R1's answer tags": {"prompt": "p", "response": "<think>r</think>\n<answer>a</answer>"},
    **{
        f"{opening} tags": {"prompt": "p", "response": f"{opening}r{closing} a"}
        for opening, closing in replies._THOUGHT_TAGS
    },
    **{
        f"{opening} around the answer": {
            "prompt": "p",
            "response": f"<think>r</think>{opening}a{closing}",
        }
        for opening, closing in replies._ANSWER_TAGS
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(form: str) -> None:
    assert accepted(FORMS[form], without_thought="reject")[:4] == ((P, A), "r", "a", ())


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        # Thoughts.
        ("<think>r <think>a", "unclosed_thought", "2 <think> and 0"),
        ("<|begin_of_thought|>r", "unclosed_thought", "begin_of_thought"),
        ("r</think>a<think>b", "reversed_thought", "before"),
        ("<think>r<think>s</think>t</think>a", "nested_thought", "2 <think> and 2"),
        ("<think>r<think>s</think>a", "nested_thought", "2 <think> and 1"),
        ("<think>r</think>a<think>s</think>b", "several_thoughts", "2 <think> and 2"),
        ("r</think>s</think>a", "several_thoughts", "0 <think> and 2"),
        ("<think></think><think>r</think>a", "several_thoughts", "2 <think> and 2"),
        ("<think></think><thinking>r</thinking>a", "several_thoughts", "empty thought"),
        ("Sure! <think>r</think>a", "text_before_thought", "5 characters"),
        ("<think>r</think> \n", "empty_answer", "nothing follows"),
        ("", "empty_answer", "response is empty"),
        ("<think>use <answer> tags</think>a", "literal_tags", "<answer> inside the reasoning"),
        ("<think>r</think></reasoning>a", "literal_tags", "</reasoning> inside the answer"),
        ("use <answer>", "literal_tags", "<answer> in the text"),
        ("<scratchpad>r</scratchpad>a", "unknown_tags", "<scratchpad>"),
        ("<|channel|>analysis<|message|>r", "unknown_tags", "<|channel|>"),
        ("<Think>r</Think>a", "unknown_tags", "<Think>"),
        (
            "<|begin_of_thought|>r<|end_of_thought|><|begin_of_solution|>a",
            "unknown_tags",
            "<|begin_of_solution|> is left",
        ),
        ({"prompt": "p", "completion": THOUGHT, "reasoning": "s"}, "several_thoughts", "field"),
        ({"prompt": "p", "completion": "a", "thinking": "<think>r"}, "several_thoughts", "field"),
        ({"prompt": "p", "completion": FORMATTED, "reasoning": "s"}, "several_thoughts", "<rea"),
        ("<think>r</think><thinking>s</thinking>a", "unknown_tags", "<thinking> is left"),
        ("<think time='3'>r</think>a", "unknown_tags", "<think time='3'>"),
        ("Hm.\n<THINKING>r</THINKING>a", "unknown_tags", "</THINKING>"),
        ("&lt;think&gt;r&lt;/think&gt;a", "unknown_tags", "&lt;think&gt;"),
        # Fields.
        ({}, "unknown_fields", "no field"),
        ("{text}", "unknown_fields", "is a str"),
        ([], "unknown_fields", "is a list"),
        ({"prompt": "p"}, "unknown_fields", '"prompt"; name them with data.columns'),
        ({"text": "t"}, "unknown_fields", "what is prompt and what is answer"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "unknown_fields", "{prompt: prompt"),
        ({"chosen": [], "rejected": []}, "unknown_fields", "{messages: chosen}"),
        ({"prompt": "p", "response": None}, "unknown_fields", '"prompt"'),
        ({"question": "q", "answer": 72}, "wrong_field", '"answer" is a int'),
        ({"prompt": Repeated("pq"), "response": "a"}, "wrong_field", "more than once"),
        ({"prompt": "p", "completion": "c", "reasoning": 1}, "wrong_field", '"reasoning" is a int'),
        ({"prompt": "a \ud800", "completion": "c"}, "wrong_field", "lone surrogate"),
        ({"text": "t", "code": "c", "test_list": []}, "wrong_field", "test_list"),
        ({"text": "t", "code": "c", "test_list": [1]}, "wrong_field", "test_list[0]"),
        ({"messages": []}, "wrong_field", '"messages" must be a list'),
        ({"conversations": "x"}, "wrong_field", '"conversations" must be a list'),
        ({"messages": ["x"]}, "wrong_field", "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "wrong_field", 'messages[0] "content" is missing'),
        ({"messages": [{"content": "p"}]}, "wrong_field", 'messages[0] "role" is missing'),
        ({"prompt": " ", "response": THOUGHT}, "empty_prompt", "no text"),
        # Text that nobody asked for.
        ({"prompt": "p", "response": "a", "hint": "h"}, "unused_text", '"hint"'),
        ({"prompt": "p", "response": "a", "history": [["q", "b"]]}, "unused_text", '"history"'),
        ({"prompt": "p", "response": "a", "question": "q"}, "unused_text", '"question"'),
        ({**chat("p", "a"), "reasoning": "r"}, "unused_text", '"reasoning"'),
        ({**chat("p", "a"), "tools": [{"name": "f"}]}, "unused_text", '"tools"'),
        (chat("p", "a", name="Bob"), "unused_text", 'messages[1] has text in "name"'),
        # Roles.
        (chat("p"), "wrong_roles", "the roles are user: "),
        (chat("p", "a", role="developer"), "wrong_roles", 'the role "developer"'),
        ({"messages": chat("p", "a")["messages"][::-1]}, "wrong_roles", "assistant, user"),
        ({"messages": [*chat("p")["messages"] * 2]}, "wrong_roles", "user, user"),
        ({"messages": [*chat("p")["messages"], {"role": "system", "content": "s"}]}, "wrong_roles",
         "user, system"),
        # Tools, other media, weights.
        (chat("p", "a", tool_calls=[{"name": "f"}]), "tools", "messages[1] has tool_calls"),
        (chat("p", "a", role="tool"), "tools", "messages[1] has the role tool"),
        (chat("p", "a", content=[{"type": "image", "url": "x"}]), "not_text", '"image"'),
        (chat("p", "a", weight=0.5), "weight", '"weight" 0.5, not 0 or 1'),
        (chat("p", "a", weight="0"), "weight", "no turn"),
        (chat("p", "a", train_detail=[{"train": True}]), "weight", '"train_detail"'),
        (chat("p", "a", masked=True), "weight", "no turn"),
        (chat("p", "a", weight=0), "weight", "no turn"),
        (chat("p", "a", train=False), "weight", "no turn"),
        (chat("p", "a", loss=False), "weight", "no turn"),
        (chat("p", "a", train="no"), "weight", '"train"'),
        ({"prompt": "p", "response": "a", "weight": 0}, "weight", '"weight" says'),
        ({"prompt": "p", "response": "a", "loss_mask": [0, 1]}, "weight", '"loss_mask" [0, 1]'),
        ({"prompt": "p", "response": "a", "kto_tag": "false"}, "weight", '"kto_tag" says'),
        ({"prompt": "p", "completion": "a", "label": False}, "weight", '"label" says'),
    ],
)  # fmt: skip
def test_rejected(row: Any, reason: str, detail: str) -> None:
    is_response = isinstance(row, str) and row != "{text}"
    result = rejected({"prompt": "p", "response": row} if is_response else row)
    assert result.reason == reason and detail in result.detail, result


def test_every_reason_and_note_is_documented() -> None:
    readme = (messages.__file__ or "").replace("messages.py", "README.md")
    with open(readme, encoding="utf-8") as file:
        text = file.read()
    for name in (*get_args(ConversionReason), *get_args(replies.Note)):
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": " a "},
        {"prompt": "p", "response": "<think>\n\n</think>\n\na"},
        {"question": "p", "answer": "a"},
        {"question": "p", "answer": "#### a"},
        {"problem": "p", "solution": "a", "reasoning": " "},
        chat("p", "a"),
    ],
)
def test_rows_without_a_thought_follow_the_policy(row: dict[str, Any]) -> None:
    plain = (P, Turn("assistant", "a")), None, None, ("plain_completion",)
    assert accepted(row)[:4] == accepted(row, without_thought="keep_plain")[:4] == plain
    assert rejected(row, without_thought="reject").reason == "no_thought"


@pytest.mark.parametrize("text", ["<end_of_turn>", "<bos>", "<unused7>", "<|im_end|>", "</s>"])
def test_control_look_alikes_are_noted_and_stay_text(text: str) -> None:
    conversation = accepted({"prompt": f"p {text}", "response": THOUGHT})
    assert conversation.turns == (Turn("user", f"p {text}"), A)
    assert conversation.notes == ("control_look_alike",)


def test_own_system_text_and_alpacas_input_are_part_of_the_prompt() -> None:
    system = Turn("system", "Rhyme.")
    for row in (
        {"system": "Rhyme.", **chat("p", THOUGHT)},
        {"system_prompt": "Rhyme.", "instruction": "p", "input": " ", "output": THOUGHT},
        {"messages": [{"role": "system", "content": "Rhyme."}, *chat("p", THOUGHT)["messages"]],
         "system": "Rhyme."},
    ):  # fmt: skip
        assert accepted(row).turns == (system, P, A)
    row = {"instruction": "Add.", "input": "2, 3", "output": THOUGHT}
    assert accepted(row).turns[0] == Turn("user", "Add.\n\n2, 3")
    asks = accepted({"system": "Use <|begin_of_thought|>.", **chat("p", THOUGHT)})
    assert asks.notes == ("control_look_alike", "system_has_other_tags")
    two = {
        "system": "x",
        "messages": [{"role": "system", "content": "y"}, *chat("p", "a")["messages"]],
    }
    assert rejected(two).reason == "unused_text"


def test_gsm8k_is_told_by_its_last_line() -> None:
    row = {
        "question": "How many clips?",
        "answer": "In May 48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 1,072",
    }
    conversation = accepted(row)
    assert conversation.reasoning == "In May 48/2 = 24 clips.\nSo 48+24 = 72."
    assert conversation.answer == "1,072"
    assert accepted({"question": "q", "answer": "r #### 1\n#### 2"}).reasoning == "r #### 1"
    assert rejected({"question": "q", "answer": "r\n####"}).reason == "empty_answer"
    titled = "#### Step 1\nAdd them up.\n##### Result\n5"
    assert accepted({"question": "q", "answer": titled}).turns[-1].content == titled


def test_mbpp_rows() -> None:
    row = {"task_id": 2, "text": " Return 1.", "code": "def f():\r\n  return 1", "test_list": ["t"]}
    asked = "Return 1.\nYour code should pass these tests:\n\n"
    plain = accepted(row | {"test_list": ["assert f() == 1", "assert f()"]})
    assert plain.turns == (
        Turn("user", f"{asked}assert f() == 1\nassert f()"),
        Turn("assistant", "def f():\n  return 1"),
    )
    assert plain.fields.unused == ("task_id",)
    assert accepted(row | {"test_setup_code": "a = 1"}).turns[0].content == f"{asked}a = 1\nt"
    assert accepted(row | {"code": THOUGHT}).turns[-1].content == FORMATTED


def test_turns_that_are_not_to_be_learnt_bear_no_loss() -> None:
    row = chat("p1", "<think>r1</think>a1", "p2", THOUGHT, "p3", "a3", weight=0)
    row["messages"][1]["weight"] = 0
    turns = accepted(row).turns  # nothing after the last trained turn matters
    assert [turn.is_trained for turn in turns if turn.role == "assistant"] == [False, True]
    assert turns[-1] == A
    lists = {
        "prompt": chat("p1", "a1", "p2")["messages"],
        "completion": [{"role": "assistant", "content": THOUGHT}],
    }
    assert [turn.is_trained for turn in accepted(lists).turns] == [True, False, True, True]


def test_earlier_reasoning_is_kept_or_stripped() -> None:
    row = chat("p1", "<think>r1</think>a1", "p2", THOUGHT)
    kept, stripped = accepted(row), accepted(row, earlier_reasoning="strip")
    assert kept.turns[1] == Turn("assistant", AnswerTemplate().join("r1", "a1"))
    assert stripped.turns[1] == Turn("assistant", "<answer>a1</answer>", is_trained=False)
    assert stripped.turns[-1] == A


def test_only_numbers_and_lone_words_are_final_answers_of_gsm8k() -> None:
    text = "Do this.\n#### Conclusion: so it is"
    assert accepted({"question": "q", "answer": text}).turns[-1].content == text


def test_chance_makes_no_text_known() -> None:
    """A short text that stands inside another one by chance is no part of the conversation."""
    row = {"prompt": "p", "response": "Because once is enough.", "answer": "once"}
    assert rejected(row).reason == "unused_text"
    long = "This sentence stands in the response, and it is a long one."
    assert accepted({"prompt": "p", "response": f"So. {long}", "summary": long})


def test_columns_of_the_user() -> None:
    columns = {"prompt": "task", "response": "text", "reasoning": "why"}
    row = {"task": "p", "text": "a", "why": "r", "hint": "not used, as the user knows"}
    conversation = accepted(row, columns=columns)
    assert conversation.turns == (P, A)
    assert conversation.fields == (("task", "text", "why"), ("hint",))
    assert accepted({"task": "p", "text": "a"}, columns=columns).reasoning is None
    assert rejected({"task": "p"}, columns=columns).detail == 'there is no response beside "task"'
    both = {"messages": "chat", **columns}  # for files of either kind
    assert accepted(row, columns=both).turns == (P, A)
    assert rejected({"chat": [], **row}, columns=both).reason == "unused_text"
    asked = {"chat": chat("p")["messages"], "text": "a", "why": "r"}
    assert accepted(asked, columns=both).turns == (P, A)
    assert accepted(FORMS["GSM8K"], columns=columns).turns == (P, A)  # has none of the columns
    assert accepted({"chosen": chat("p", THOUGHT)["messages"], "rejected": "x"},
                    columns={"messages": "chosen"}).turns == (P, A)  # fmt: skip


def test_another_template() -> None:
    template = AnswerTemplate("<think>{reasoning}</think>{answer}")
    for form in ("prompt, response", "in the template's form", "reasoning_content"):
        assert accepted(FORMS[form], template=template).turns[-1].content == THOUGHT
    assert template.split(THOUGHT) == ("r", "a")
    assert template.without_reasoning(THOUGHT) == "a"
    assert rejected({"prompt": "p", "response": FORMATTED + "<think>"}, template=template)
    for text in (
        "{answer}{reasoning}",
        "<a>{reasoning}<a>{answer}",
        "{reasoning}</t>{answer}",
        "x",
    ):
        with pytest.raises(ValueError):
            AnswerTemplate(text)


def test_split_is_the_inverse_of_join() -> None:
    template = AnswerTemplate()
    assert template.split(template.join("r\nr", "a")) == ("r\nr", "a")
    for text in ("", "a", FORMATTED + "x", FORMATTED * 2, template.join("r", " ")):
        assert template.split(text) is None
    exact = r"^\s*<reasoning>.+?</reasoning>.*?<answer>(.+?)</answer>\s*$"
    match = re.match(exact, template.join("one\ntwo", "three\nfour"), re.DOTALL)
    assert match is not None and match[1] == "three\nfour"  # the exact format of the evaluation


def test_prompts_need_no_answer() -> None:
    for row in (*FORMS.values(), {"prompt": "p"}, {"question": "p", "answer": 3}, chat("p")):
        assert convert_prompt(row) == (P,), row
    turns = (Turn("system", "s"), P, Turn("assistant", "a"), Turn("user", "q"))
    assert convert_prompt({"system": "s", **chat("p", "a", "q", "b")}) == turns
    assert isinstance(convert_prompt({"prompt": "p", "hint": "h"}), Rejected)
    assert isinstance(convert_prompt({"answer": "p"}), Rejected)


MARKER = "Zq7marker"


def text_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every string in the value, but for roles and types."""
    if isinstance(value, str):
        return [path]
    if not isinstance(value, dict | list):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    kept = [(key, each) for key, each in items if key not in ("role", "from", "type")]
    return [place for key, each in kept for place in text_places(each, (*path, key))]


EXTRA_NAMES = ["hint", "text", "reasoning", "thoughts", "input", "system", "tools", "history"]
EXTRA_NAMES += ["name", "note", "answer", "final_answer", "chosen", "conversation", "source"]
EXTRA_VALUES = [MARKER, [MARKER], {"a": [MARKER]}, [{"role": "user", "b": MARKER}]]
EXTRAS = st.tuples(st.sampled_from(EXTRA_NAMES), st.sampled_from(EXTRA_VALUES))


@given(
    form=st.sampled_from(list(FORMS)),
    place=st.integers(0, 9),
    extra=st.none() | EXTRAS,
    in_message=st.booleans(),
)
def test_no_text_is_dropped_without_a_word(
    form: str, place: int, extra: tuple[str, Any] | None, in_message: bool
) -> None:
    row = copy.deepcopy(FORMS[form])
    if extra is None:
        places = text_places(row)
        *path, name = places[place % len(places)]
        target = row
        for key in path:
            target = target[key]
        target[name] = f"{target[name]} {MARKER}" if target[name].strip() else MARKER
        where = [str(path[0] if path else name), str(name)]
    else:
        target = row
        if in_message and row.get("messages"):
            target = row["messages"][place % len(row["messages"])]
        target[extra[0]] = extra[1]
        where = [extra[0]]
    result = convert_row(row)
    if isinstance(result, Rejected):  # the report has the reason and the row's place
        assert result.reason != "unused_text" or re.search('"[a-z_]+"', result.detail)
        return
    texts = "\n".join(turn.content for turn in result.turns)
    unused = [name.rpartition("[].")[2] for name in result.fields.unused]
    assert MARKER in texts or any(name in unused for name in where), (row, result)


def test_names_of_harmless_fields() -> None:
    harmless = ["id", "uuid", "task_id", "source", "data_source", "score", "quality_score", "lang"]
    harmless += ["num_tokens", "category", "url", "difficulty", "model", "created_at"]
    assert all(map(is_harmless, harmless))
    text = ["prompt", "hint", "explanation", "body", "text", "reasoning", "valid", "widget"]
    assert not any(map(is_harmless, text))
    assert is_wanted("hint", True) and not is_wanted("hint", False) and is_wanted("prompt", False)
    assert not is_wanted("prompt", True, {"prompt": "hint"})
