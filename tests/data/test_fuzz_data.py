"""Fuzzing from the bytes of a file to the ids of a chat: damaged files, hostile rows.

What the reader, the converter and the renderer may do with any input is to give a result that
holds, or ValueError that names the place.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_tokenizer import FakeTokenizer

from jaxsft.data.chat import encode_chat
from jaxsft.data.rows import Conversation, Rejected, Turn, convert_row, split_completion
from jaxsft.data.sources import read_rows

fuzzed = settings(deadline=None, max_examples=400)

RESERVED = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<unused0>", "[multimodal]"),
]
TAGS = ["<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>", "####"]
SHARDS = [
    *TAGS,
    *RESERVED,
    "<",
    ">",
    "/",
    "<|",
    "\n",
    "model\n",
    "user\n",
    "\x00",
    "\u2028",
    "\u00a0",
]
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
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
NAMES = ["prompt", "response", "completion", "reasoning_content", "instruction", "question"]
NAMES += ["answer", "messages", "conversations", "role", "content", "from", "value"]
ANY_ROWS = st.dictionaries(st.sampled_from(NAMES) | TEXTS, JSON_VALUES, max_size=5)


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
    read = []
    try:
        for where, row in read_rows(file):
            assert isinstance(row, dict)
            number = int(where.removeprefix(f"{file}:"))
            assert json.loads(lines[number - 1]) == row
            read.append(number)
        stop = len(lines) + 1
        assert read
    except ValueError as error:
        match = re.fullmatch(rf"{re.escape(str(file))}(?::(\d+))?: (.+)", str(error), re.DOTALL)
        assert match, error
        # Without a number it is the file as a whole that is empty.
        stop = int(match[1]) if match[1] else len(lines) + 1
        assert match[1] or not read
    # Nothing was passed over but blank lines.
    assert read == [n for n, line in enumerate(lines, 1) if n < stop and line.strip()]


@fuzzed
@given(row=ANY_ROWS | near_valid_rows())
def test_any_row_comes_back_from_its_ids(file: Path, row: dict[str, Any]) -> None:
    file.write_text(json.dumps(row), encoding="utf-8")
    [(_, read)] = read_rows(file)
    assert read == row
    check_row(FakeTokenizer(), row)


@fuzzed
@given(row=near_valid_rows())
def test_near_valid_row_real_tokenizer(tokenizer: Any, row: dict[str, Any]) -> None:
    check_row(tokenizer, row)


def check_row(tokenizer: Any, row: dict[str, Any]) -> None:
    """Converts and renders a row; the texts are in the ids, between the template's control ids."""
    try:
        conversation = convert_row(row)
    except ValueError as error:
        assert str(error)
        return
    if isinstance(conversation, Rejected):
        return
    ids = encode_chat(tokenizer, conversation.turns).ids.tolist()
    texts = decode_turns(tokenizer, ids)
    assert texts == render(conversation.turns)
    last = texts[-1].removeprefix("model\n")
    assert split_completion(last) == parts_of(conversation)


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


def render(turns: tuple[Turn, ...]) -> list[str]:
    """What every turn's text must be, the system turn in front of the first user turn."""
    system = [turn.content for turn in turns if turn.role == "system" and turn.content]
    names = {"user": "user", "assistant": "model"}
    texts = [f"{names[turn.role]}\n{turn.content}" for turn in turns if turn.role != "system"]
    if system:
        texts[0] = f"user\n{system[0]}\n\n{turns[1].content}"
    return texts


def parts_of(conversation: Conversation) -> tuple[str, str] | None:
    if conversation.reasoning is None or conversation.answer is None:
        return None
    return conversation.reasoning, conversation.answer
