"""Answers as they come in pieces: no character and no tag in halves, and files of prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import DEFAULTS, RowOptions, Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.decode import SamplingOptions
from jaxsft.generate.chat import ChatSession, encode, printable, text_of_tokens
from jaxsft.generate.prompts import read_prompt_file
from jaxsft.weights.find import Taught

ANSWER = "so\n<reasoning>1 < 2 </b> é</reasoning>\n<answer>5</answer>!"


FORMS = (
    (AnswerTemplate(), ANSWER, ["so\n\n!", "1 < 2 </b> é", "5"]),
    (AnswerTemplate("[T]{reasoning}[/T]{answer}"), "[T]a[b]c[/T] 5 [/", ["", "a[b]c", " 5 [/"]),
    (
        AnswerTemplate("Reasons: {reasoning}\nSo the answer: {answer}"),
        "Hm. Reasons: So, so.\nSo the answer: 5. So",
        ["Hm. ", " So, so.\n", " 5. So"],
    ),
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize(("form", "text", "parts"), FORMS)
def test_tags_split_over_pieces(
    form: AnswerTemplate, text: str, parts: list[str], size: int
) -> None:
    pieces = list(form.pieces(text[i : i + size] for i in range(0, len(text), size)))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.text for piece in pieces if piece.is_marker] == list(form.markers)
    for name, expected in zip(("text", "reasoning", "answer"), parts, strict=True):
        found = (piece.text for piece in pieces if piece.part == name and not piece.is_marker)
        assert "".join(found) == expected


def test_only_what_may_become_a_tag_is_held_back() -> None:
    for pieces, expected in (
        (["a <", "ans", "x"], ["a ", "<ansx"]),
        (["1 <", " 2"], ["1 ", "< 2"]),
        (["x<answ"], ["x", "<answ"]),  # what is still held at the end was text
    ):
        found = list(AnswerTemplate().pieces(pieces))
        assert found == [(text, "text", False) for text in expected]


def test_a_chat_shows_a_model_what_training_showed_it(tokenizer: Tokenizer) -> None:
    first, later = Turn("user", "a"), Turn("user", "b")
    whole = Turn("assistant", "<reasoning>So.</reasoning>\n<answer>A</answer>")
    seen = {"keep": whole, "strip": Turn("assistant", "<answer>A</answer>")}
    for earlier, shown in seen.items():
        taught = Taught("", AnswerTemplate(), earlier)
        session = ChatSession(tokenizer, taught, 1000, SamplingOptions(1, 8), Console())
        ids = encode([first, whole, later], session)
        assert ids == encode_prompt(tokenizer, [first, shown, later])


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    text = "né 🦜\U000e0041 你"  # a tag character and others that are spelt in bytes
    ids = tokenizer.encode(text)
    assert any(tokenizer.piece(token).startswith("<0x") for token in ids)
    pieces = list(text_of_tokens(tokenizer, ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) < len(ids)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_pieces_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever bytes a model puts one after the other, cut characters among them."""
    first_byte = next(i for i in range(1000) if tokenizer.piece(i) == "<0x00>")
    byte = st.sampled_from([*range(0x78, 0x100)]).map(lambda value: first_byte + value)
    word = st.sampled_from([*tokenizer.encode("a � <answer>"), tokenizer.end_of_turn_id])
    ids = data.draw(st.lists(byte | word, max_size=12))
    assert "".join(text_of_tokens(tokenizer, ids)) == tokenizer.decode(ids)


def test_control_characters_have_no_effect() -> None:
    assert printable("👩\u200d🚀 می\u200cروم") == "👩\u200d🚀 می\u200cروم"
    assert printable("a\tb\n\x1b[31mred\x07\r\x9b1m") == "a\tb\n\\u{1b}[31mred\\u{7}\\u{d}\\u{9b}1m"


def test_prompts_are_what_training_would_ask(write: Callable[..., Path]) -> None:
    thought = "<think>So.</think>Hi!"
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " b "}
    path = write(
        {"prompt": "a", "response": "not read"},
        {"question": "How many?", "answer": "no mark"},
        {"instruction": "Do."},
        {"text": "Write f.", "test_list": ["assert f() == 1"], "code": None},
        {"messages": [system, user, {"role": "assistant", "content": thought}, user]},
        {"messages": [user, {"role": "assistant", "content": ""}]},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": ""}]},
        {"prompt": "d", "hint": "e"},
    )
    prompts, left_out = read_prompt_file(path, "S", DEFAULTS)
    own, asked = Turn("system", "S"), [prompt.turns[-1].content for prompt in prompts]
    mbpp = "Write f.\nYour code should pass these tests:\n\nassert f() == 1"
    assert asked == ["a", "How many?", "Do.", mbpp, "b", "b", "c"]
    assert [prompt.turns[0] for prompt in prompts] == [*[own] * 4, Turn(**system), own, own]
    assert [len(prompt.turns) for prompt in prompts] == [2, 2, 2, 2, 4, 2, 2]
    assert prompts[4].turns[2].content == "<reasoning>So.</reasoning>\n<answer>Hi!</answer>"
    assert prompts[2].where == f"{path}:3"
    assert left_out == [
        f'{path}:8 ("hint" holds text that would not be used; name the columns to '
        "use with data.columns, or remove it)"
    ]
    form = AnswerTemplate("<think>{reasoning}</think>{answer}")
    how = RowOptions({"prompt": "answer"}, earlier_reasoning="keep", template=form)
    taught = read_prompt_file(path, "S", how).prompts
    assert taught[4].turns[2].content == "<think>So.</think>Hi!"
    assert taught[1].turns[-1].content == "no mark"  # the column that the run's config names
    stripped = read_prompt_file(path, "S", how._replace(earlier_reasoning="strip")).prompts
    assert stripped[4].turns[2].content == "Hi!"

    lines = path.with_suffix(".TXT")
    lines.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \n")
    assert [(p.where, p.turns) for p in read_prompt_file(lines, "S", DEFAULTS).prompts] == [
        (f"{lines}:1", (own, Turn("user", "one"))),
        (f"{lines}:3", (own, Turn("user", "two"))),
    ]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"answer": "x"}, "rows.jsonl: holds no prompts; "),
        ({"prompt": " "}, "rows.jsonl:1 (a user turn has no text)"),
        ({"messages": []}, 'rows.jsonl:1 ("messages" must be a list'),
        ({"messages": "hi"}, 'rows.jsonl:1 ("messages" must be a list'),
        (b'{"prompt": "a"', "rows.jsonl:1: broken or cut off at column"),
        (b"", "rows.jsonl: is empty"),
    ],
)
def test_rows_that_are_no_prompts(row: Any, line: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError) as caught:
        read_prompt_file(write(row), "", DEFAULTS)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_texts_that_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content, line in ((b"\xff", "is not UTF-8"), (b"\n \n", "holds no prompts")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=line):
            read_prompt_file(path, "", DEFAULTS)
    with pytest.raises(ValueError, match=r"none.txt: cannot be read \(No such file"):
        read_prompt_file(tmp_path / "none.txt", "", DEFAULTS)
