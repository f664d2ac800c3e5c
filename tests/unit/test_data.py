import json
import re
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from fake_tokenizer import FakeTokenizer

from jaxsft.chat import encode_chat
from jaxsft.config import SYSTEM_PROMPT
from jaxsft.data import DataReport, load_samples, read_rows
from jaxsft.reasoning import Turn, completion_text

GOOD = {"prompt": "What is 1 + 1?", "response": "<think>One and one.</think>Two"}
LONG = {"prompt": "p", "response": f"<think>{'We add one more. ' * 30}</think>Two"}
LONG_ANSWER = {"prompt": "p", "response": f"<think>Short.</think>{'Two. ' * 80}"}


@pytest.fixture
def fake() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture
def write(tmp_path):
    def write_lines(*rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write_lines


def text_of(fake, sample, labels_only=False) -> str:
    return fake.decode(sample.ids[sample.loss_mask | (not labels_only)].tolist())


# Reading


def test_rows_carry_file_and_line(write):
    path = write({"a": 1}, b"", b"  \r", {"a": 2})
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n', ["x", "y"]),  # BOM and CRLF
        (b'{"a": "x"}\n{"a": "y"}', ["x", "y"]),  # no newline at the end
        (b'{"a": "nul \\u0000 kept"}\n', ["nul \0 kept"]),
        (
            '{"a": "line\u2028separator, \U0001f469"}\n'.encode(),
            ["line\u2028separator, \U0001f469"],
        ),
        (b'{"a": "2024-01-01T00:00:00"}\n', ["2024-01-01T00:00:00"]),
        (b'{"a": "\\ud83d\\udc69"}\n', ["\U0001f469"]),  # a surrogate pair is one character
    ],
)
def test_accepted_files(tmp_path, content, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert [row["a"] for _, row in read_rows(path)] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "x"', r"broken or cut off at column 10 \(Expecting ',' delimiter\)"),
        (b'{"a": "x', "broken or cut off at column 7"),
        (b"{'a': 1}", "every line must be one complete JSON object"),
        (b'{"a": 1} {"b": 2}', "broken or cut off at column 10"),
        (b'{"a": "tab\there"}', "broken or cut off"),
        (b"[1, 2]", "is a JSON list"),
        (b'"text"', "is a JSON str"),
        (b"null", "is a JSON NoneType"),
        (b'{"a": "\xff"}', r"byte 8 of the line \(0xff\) is not UTF-8; save the file as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),  # a surrogate written as UTF-8
        (b'{"a": 1, "b": 2, "a": 3}', 'the key "a" is there more than once'),
        (b'{"a": {"b": 1, "b": 2}}', 'the key "b" is there more than once'),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "4300 digits"),
    ],
)
def test_bad_lines(write, line, message):
    path = write({"a": 1}, line)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path, write):
    with pytest.raises(ValueError, match=r"absent.jsonl: cannot be read \(No such file"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"absent.parquet: cannot be read"):
        list(read_rows(tmp_path / "absent.parquet"))
    with pytest.raises(ValueError, match="is a directory"):
        list(read_rows(tmp_path))
    for lines in ((), (b"", b" ")):
        with pytest.raises(ValueError, match="is empty"):
            list(read_rows(write(*lines)))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: byte 1 of the line \(0xff\)"):
        list(read_rows(write(json.dumps(GOOD).encode("utf-16"))))


def test_parquet(tmp_path, fake):
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([GOOD, LONG]), path)
    assert list(read_rows(path)) == [(f"{path}:row 1", GOOD), (f"{path}:row 2", LONG)]
    assert load_samples(path, fake, 2000, "raise", None)[1].samples == 2
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows.parquet: not a complete Parquet file after row 0"):
        list(read_rows(path))
    parquet.write_table(arrow.Table.from_pylist([GOOD, {**GOOD, "response": None}]), path)
    with pytest.raises(ValueError, match=r'rows.parquet:row 2: "response" is null'):
        load_samples(path, fake, 2000, "raise", None)


# Samples


def test_sample_is_the_encoded_chat(write, fake):
    samples, report = load_samples([write(GOOD)], fake, 500, "raise", SYSTEM_PROMPT)
    turns = [
        Turn("system", SYSTEM_PROMPT),
        Turn("user", "What is 1 + 1?"),
        Turn("assistant", completion_text("One and one.", "Two")),
    ]
    expected = encode_chat(fake, turns)
    np.testing.assert_array_equal(samples[0].ids, expected.ids)
    np.testing.assert_array_equal(samples[0].loss_mask, expected.loss_mask)
    assert (report.rows_read, report.samples) == (1, 1)
    assert report.num_tokens == len(expected.ids)
    assert report.num_loss_tokens == expected.loss_mask.sum()


def test_system_prompt_is_optional_and_gives_way(write, fake):
    own = [
        {"role": "system", "content": "Own."},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c"},
    ]
    path = write(GOOD, {"messages": own})
    texts = [text_of(fake, s) for s in load_samples(path, fake, 500, "raise", "Ours.")[0]]
    assert texts[0].startswith("<bos><start_of_turn>user\nOurs.\n\nWhat is")
    assert texts[1].startswith("<bos><start_of_turn>user\nOwn.\n\np<end_of_turn>")
    texts = [text_of(fake, s) for s in load_samples(path, fake, 500, "raise", None)[0]]
    assert texts[0].startswith("<bos><start_of_turn>user\nWhat is")


def test_loss_on_prompt(write, fake):
    path = write(GOOD, LONG)
    samples, report = load_samples(path, fake, 200, "shorten", None, loss_on_prompt=True)
    for sample in samples:
        assert not sample.loss_mask[0] and sample.loss_mask[1:].all()
    assert report.shortened == 1
    assert report.num_loss_tokens == report.num_tokens - 2


def test_every_row_is_counted(write, fake):
    path = write(
        GOOD,
        {"prompt": "p", "response": "no thought"},
        {"prompt": "p", "response": "r</think>a <eos>"},
        {"prompt": "p", "response": "<think>"},
        {"prompt": "p", "response": "nor here"},
        LONG,
        LONG_ANSWER,
    )
    samples, report = load_samples(path, fake, 200, "shorten", None)
    assert len(samples) == report.samples == 3
    assert report.rows_read == 7
    assert report.rejected == {"no_thought": 2, "unclosed_thought": 1}
    assert report.noted == {"implicit_open": 1, "control_look_alike": 1}
    assert (report.shortened, report.dropped) == (1, 1)
    total = report.samples + report.rejected.total() + report.dropped
    assert total == report.rows_read
    text = "\n".join(report.lines())
    assert "7 rows read, 3 kept (42.9%)" in text
    assert f"2 rejected: no_thought, first {path}:2 (no <think>" in text
    assert re.search(
        rf"1 dropped: too long, first {re.escape(str(path))}:7 \(\d+ tokens, limit 200\)", text
    )
    assert re.search(r"1 shortened by \d+ tokens", text)
    assert "1 noted: implicit_open" in text


def test_shortened_rows_end_whole(write, fake):
    samples, _ = load_samples(write(LONG), fake, 120, "shorten", None)
    completion = text_of(fake, samples[0], labels_only=True)
    assert completion.startswith("<reasoning>We add one more. We add")
    assert completion.endswith(" one more.</reasoning>\n<answer>Two</answer><end_of_turn>")
    assert len(samples[0].ids) <= 120


def test_drop_and_raise(write, fake):
    path = write(GOOD, LONG)
    samples, report = load_samples(path, fake, 120, "drop", None)
    assert (len(samples), report.dropped, report.shortened) == (1, 1, 0)
    with pytest.raises(ValueError, match=r"rows.jsonl:2 \(\d+ tokens, limit 120\): too long"):
        load_samples(path, fake, 120, "raise", None)
    with pytest.raises(ValueError, match='overlong is "cut"; use shorten, drop or raise'):
        load_samples(path, fake, 120, "cut", None)


def test_plain_completions_are_not_shortened(write, fake):
    path = write(GOOD, {"prompt": "p", "completion": "word " * 300})
    samples, report = load_samples(path, fake, 200, "shorten", None)
    assert (len(samples), report.dropped) == (1, 1)
    assert report.noted == {"plain_completion": 1}


def test_a_bad_row_names_its_line(write, fake):
    path = write(GOOD, {"prompt": "p", "response": None})
    with pytest.raises(ValueError, match=r'rows.jsonl:2: "response" is null') as caught:
        load_samples(path, fake, 500, "shorten", None)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*lone surrogate"):
        load_samples(write({"prompt": "\ud800", "response": "r"}), fake, 500, "drop", None)
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: no accepted set of fields \(found: text\)"
    ):
        load_samples(write({"text": "t"}), fake, 500, "drop", None)


def test_no_sample_left(write, fake):
    path = write({"prompt": "p", "response": "no"}, LONG)
    with pytest.raises(ValueError, match=r"no sample is left. 2 rows read, 0 kept") as caught:
        load_samples(path, fake, 100, "drop", None)
    assert "1 rejected: no_thought" in str(caught.value)
    assert "1 dropped: too long" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no rows in the range 2:"):
        load_samples(path, fake, 100, "drop", None, start=2)
    with pytest.raises(ValueError, match="no files: no rows"):
        load_samples([], fake, 100, "drop", None)


def test_range_runs_over_all_files(write, fake):
    rows = [{"prompt": f"p{i}", "response": "<think>r</think>a"} for i in range(6)]
    paths = [write(*rows[:2], name="a.jsonl"), write(*rows[2:], name="b.jsonl")]
    for start, stop in ((0, None), (1, 4), (2, 3), (5, 6)):
        samples, report = load_samples(paths, fake, 500, "raise", None, start=start, stop=stop)
        names = [re.findall(r"p\d", text_of(fake, sample))[0] for sample in samples]
        assert names == [f"p{i}" for i in range(6)][start:stop]
        assert report.rows_read == len(names)
    # Fewer rows than the recipe counts on would silently mean more epochs.
    with pytest.raises(ValueError, match=r"only 1 of these 94 are there; lower data.stop"):
        load_samples(paths, fake, 500, "raise", None, start=5, stop=99)


def test_more_rows_than_one_chunk(write, fake):
    rows = [{"prompt": f"p{i}", "response": "<think>r</think>a"} for i in range(2100)]
    samples, report = load_samples(write(*rows), fake, 500, "raise", None)
    assert report.samples == 2100
    assert all(f"p{i}<end" in text_of(fake, sample) for i, sample in enumerate(samples))


def test_an_empty_report_has_lines():
    assert DataReport().lines() == ["0 rows read, 0 kept (0.0%): 0 tokens, 0 of them with loss"]


def test_real_tokenizer(write, tokenizer):
    path = write(GOOD, LONG, {"prompt": "<bos>", "response": "<think>\U0001f469<eos></think>\0"})
    samples, report = load_samples(path, tokenizer, 120, "shorten", SYSTEM_PROMPT)
    assert (report.samples, report.shortened) == (3, 1)
    for sample in samples:
        assert len(sample.ids) <= 120
        text = tokenizer.decode(sample.ids[sample.loss_mask].tolist())
        assert text.startswith("<reasoning>") and text.endswith("</answer><end_of_turn>")
        assert sample.ids[-1] == tokenizer.end_of_turn_id
        assert sample.ids.tolist().count(tokenizer.bos_id) == 1
