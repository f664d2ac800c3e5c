"""Fuzzing from the bytes of a file to the ids of a chat: damaged files, hostile rows.

What the reader, the converter and the renderer may do with any input is to give a result that
holds, or ValueError that names the place.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_tokenizer import FakeTokenizer

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chat, encode_prompt
from jaxsft.data.containers import object_of
from jaxsft.data.fields import PARTS
from jaxsft.data.replies import ConversionReason, Rejected
from jaxsft.data.rows import (
    Conversation,
    Turn,
    check_roles,
    convert_row,
)
from jaxsft.data.sources import read_rows

fuzzed = settings(deadline=None, max_examples=400)

RESERVED = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<unused0>", "[multimodal]"),
]
TAGS = [
    "<think>",
    "</think>",
    "<|begin_of_thought|>",
    "<|end_of_thought|>",
    "</thinking>",
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "####",
]
OTHERS = ["<", ">", "/", "<|", "\n", "model\n", "user\n", "\x00", "\u2028", "\u00a0", "\n\n", ". "]
SHARDS = [*TAGS, *RESERVED, *OTHERS, "<<1=1>>"]
# U+2581 is out: to every tokenizer of Gemma it is a space.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXTS = st.lists(st.sampled_from(SHARDS) | st.text(CHARACTERS, max_size=6), max_size=8).map("".join)

GLAIVE = {"prompt": "Why so?", "response": "<think>Because it is.\n\nSurely.</think>\nIt is 4."}
VALID_ROWS = [
    GLAIVE,
    {"prompt": "Why?", "completion": "So.", "reasoning_content": "I wonder."},
    {"instruction": "Count.", "response": "<reasoning>One.</reasoning>\n<answer>1</answer>"},
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So.", "reasoning_content": "I wonder."},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]},
]
VALID_BYTES = b"\n".join(json.dumps(row).encode() for row in VALID_ROWS) + b"\n"
DAMAGE = st.sampled_from(
    [
        *(
            b"\n",
            b"\r\n",
            b"\r",
            b"",
            b'"',
            b"\\",
            b"\\u",
            b"\\ud800",
            b"{",
            b"}",
            b"[",
            b"]",
            b",",
        ),
        *(b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xe2\x80\xa8", b"NaN"),
        *(b"-Infinity", b"1e999", b"9" * 5000, b'"prompt":', b"null", b"[" * 100_000),
        *(b'{"a":' * 2000, b"<end_of_turn>", b"</think>"),
    ]
)


def edited(sequences: st.SearchStrategy[Any], patches: st.SearchStrategy[Any]) -> Any:
    """Text or bytes with up to four spans replaced by patches."""

    @st.composite
    def draw_edited(draw: st.DrawFn) -> Any:
        sequence = draw(sequences)
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(sequence)))
            length = draw(st.integers(0, 12))
            sequence = sequence[:start] + draw(patches) + sequence[start + length :]
        return sequence

    return draw_edited()


FILES = st.binary(max_size=200) | edited(st.just(VALID_BYTES), DAMAGE | st.binary(max_size=4))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
NAMES = [name for names in PARTS.values() for name in names]
NAMES += ["role", "content", "from", "value", "text", "code", "test_list", "weight"]
ANY_ROWS = st.dictionaries(st.sampled_from(NAMES) | TEXTS, JSON_VALUES, max_size=5)
# Mostly well formed, so that acceptance is exercised as well.
THOUGHTS = st.tuples(TEXTS, TEXTS).map(lambda pair: f"<think>{pair[0]}</think>{pair[1]}")
GLAIVE_ROWS = st.fixed_dictionaries({"prompt": TEXTS, "response": THOUGHTS})
ROLES = st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXTS | THOUGHTS},
        optional={"reasoning_content": TEXTS, "weight": st.sampled_from([0, 1])},
    )
    | st.fixed_dictionaries({"from": ROLES, "value": THOUGHTS})
    | JSON_VALUES,
    max_size=5,
)
EXCHANGES = st.lists(st.tuples(TEXTS, TEXTS | THOUGHTS), min_size=1, max_size=3)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every string in it changed, but for the keys and roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [with_strings(each, change) for each in value]
    if isinstance(value, dict):
        kept = ("role", "from")
        return {k: v if k in kept else with_strings(v, change) for k, v in value.items()}
    return value


@st.composite
def near_valid_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A valid row with tags, control tokens and anything else put into its texts."""
    patches = st.sampled_from([*SHARDS, *RESERVED, "\ud800"]) | st.text(CHARACTERS, max_size=3)
    row = draw(st.sampled_from(VALID_ROWS))
    return dict(with_strings(row, lambda text: draw(edited(st.just(text), patches))))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.jsonl"


@fuzzed
@given(data=FILES)
def test_reader(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    read, error = [], None
    try:
        read += ((where, repr(row)) for where, row in read_rows(file))
        assert read
    except ValueError as caught:
        error = str(caught)
        assert re.fullmatch(rf"{re.escape(str(file))}(:(row )?\d+)?: .+", error), error
    # Objects on lines of their own are read up to the first other line, and nothing is passed over.
    expected = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line.decode(), object_pairs_hook=object_of)
            except (ValueError, RecursionError):
                break
            if not expected and not isinstance(row, dict):
                break
            expected.append((f"{file}:{number}", repr(row)))
    else:
        assert error is None or not expected
    assert read[: len(expected)] == expected


@fuzzed
@given(row=ANY_ROWS | near_valid_rows() | GLAIVE_ROWS | st.builds(dict, messages=MESSAGES))
def test_any_row_comes_back_from_its_ids(file: Path, row: dict[str, Any]) -> None:
    # Twice: one object may be a list of rows with a name.
    file.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    assert [read for _, read in read_rows(file)] == [row, row]
    check_row(FakeTokenizer(), row)


@fuzzed
@given(row=near_valid_rows())
def test_near_valid_row_real_tokenizer(tokenizer: Any, row: dict[str, Any]) -> None:
    check_row(tokenizer, row)


@fuzzed
@given(system=TEXTS, exchanges=EXCHANGES)
def test_any_chat(tokenizer: Any, system: str, exchanges: list[tuple[str, str]]) -> None:
    turns = [Turn("system", system)]
    for user, assistant in exchanges:
        turns += [Turn("user", user), Turn("assistant", assistant)]
    check_chat(FakeTokenizer(), turns)
    check_chat(tokenizer, turns)
    check_chat(tokenizer, turns[1:])


def check_row(tokenizer: Any, row: dict[str, Any]) -> None:
    """Converts and renders a row: it is rejected with a reason, or a whole conversation."""
    result = convert_row(row)
    if isinstance(result, Rejected):
        assert result.reason in get_args(ConversionReason) and result.detail
        return
    check_roles(result.turns, last="assistant")
    assert all(turn.content and turn.content == turn.content.strip() for turn in result.turns)
    last = result.turns[-1].content
    if result.reasoning is None or result.answer is None:
        assert result.reasoning is result.answer is None and AnswerTemplate().split(last) is None
    else:
        assert last == AnswerTemplate().join(result.reasoning, result.answer)
        assert AnswerTemplate().split(last) == (result.reasoning, result.answer)
    # What was accepted is stable: it converts to itself.
    messages = [
        {"role": turn.role, "content": turn.content, "train": turn.is_trained}
        for turn in result.turns
    ]
    again = convert_row({"messages": messages})
    assert isinstance(again, Conversation) and again[:3] == result[:3]
    check_chat(tokenizer, list(result.turns))


def check_chat(tokenizer: Any, turns: list[Turn]) -> None:
    """Texts come back from the ids, control ids stand between them; labels, prompts are right."""
    sample = encode_chat(tokenizer, turns)
    ids = sample.ids.tolist()
    assert decode_turns(tokenizer, ids) == render(turns)
    # The labels are the trained answers and their ends, exactly.
    expected = []
    for turn in turns:
        if turn.role == "assistant" and turn.is_trained:
            expected += [*tokenizer.encode(turn.content.strip()), tokenizer.end_of_turn_id]
    assert sample.ids[sample.loss_mask].tolist() == expected
    # Every prompt is a prefix of the chat.
    for index, turn in enumerate(turns):
        if turn.role == "user":
            prompt = encode_prompt(tokenizer, turns[: index + 1])
            assert ids[: len(prompt)] == prompt
            assert sample.loss_mask[len(prompt)] == turns[index + 1].is_trained
            assert not sample.loss_mask[len(prompt) - 1]


def decode_turns(tokenizer: Any, ids: list[int]) -> list[str]:
    """The texts of all turns, from ids alone; asserts that control ids stand where they should."""
    bos, start, end = tokenizer.bos_id, tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    control = getattr(tokenizer, "control_ids", range(256, 261))
    found = [token for token in ids if token in control]
    num_turns = (len(found) - 1) // 2
    assert found == [bos, *[start, end] * num_turns]
    assert ids[0] == bos and ids[-1] == end
    texts = []
    position = 1
    for _ in range(num_turns):
        stop = ids.index(end, position)
        assert ids[position] == start
        texts.append(tokenizer.decode(ids[position + 1 : stop]))
        gap = tokenizer.encode("\n")
        assert stop == len(ids) - 1 or ids[stop + 1 : stop + 1 + len(gap)] == gap
        position = stop + 1 + len(gap)
    return texts


def render(turns: list[Turn]) -> list[str]:
    """What every turn's text must be, the system turn in front of the first user turn."""
    system = "".join(f"{t.content.strip()}\n\n" for t in turns if t.role == "system")
    names = {"user": "user\n", "assistant": "model\n"}
    texts = [turn.content.strip() for turn in turns if turn.role != "system"]
    texts[0] = (system if system.strip() else "") + texts[0]
    roles = [turn.role for turn in turns if turn.role != "system"]
    return [names[role] + text for role, text in zip(roles, texts, strict=True)]
