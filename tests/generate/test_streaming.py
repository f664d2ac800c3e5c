"""Answers as they come in pieces: no character and no tag in halves, and files of prompts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.generate.chat import parts_of_text, printable, text_of_tokens
from jaxsft.generate.prompts import read_prompt_file

ANSWER = "so\n<reasoning>1 < 2 </b> é</reasoning>\n<answer>5</answer>!"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_tags_split_over_pieces(size: int) -> None:
    parts = list(parts_of_text(ANSWER[i : i + size] for i in range(0, len(ANSWER), size)))
    assert "".join(text for _, text in parts) == ANSWER
    assert [text for kind, text in parts if kind == "tag"] == re.findall(
        "</?(?:rea|ans).*?>", ANSWER
    )
    for kind, text in (("text", "so\n\n!"), ("reasoning", "1 < 2 </b> é"), ("answer", "5")):
        assert "".join(part for each, part in parts if each == kind) == text


def test_only_what_may_become_a_tag_is_held_back() -> None:
    for pieces, expected in (
        (["a <", "ans", "x"], ["a ", "<ansx"]),
        (["1 <", " 2"], ["1 ", "< 2"]),
        (["x<answ"], ["x", "<answ"]),  # what is still held at the end was text
    ):
        assert list(parts_of_text(pieces)) == [("text", text) for text in expected]


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
    prompts, left_out = read_prompt_file(path, "S")
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

    lines = path.with_suffix(".TXT")
    lines.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \n")
    assert [(p.where, p.turns) for p in read_prompt_file(lines, "S").prompts] == [
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
        read_prompt_file(write(row), "")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_texts_that_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content, line in ((b"\xff", "is not UTF-8"), (b"\n \n", "holds no prompts")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=line):
            read_prompt_file(path, "")
    with pytest.raises(ValueError, match=r"none.txt: cannot be read \(No such file"):
        read_prompt_file(tmp_path / "none.txt", "")
