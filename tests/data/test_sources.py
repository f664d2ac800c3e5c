import hashlib
import json
import os
from pathlib import Path

import datasets
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from jaxsft.data.sources import RowFile, count_rows, file_digest, read_rows, row_files

GOOD = {"prompt": "What is 1 + 1?", "response": "<think>One and one.</think>Two"}
MORE = {"prompt": "p", "response": "<think>r</think>a"}


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
        (b"{'a': 1}", "every line must be one complete JSON object"),
        (b'{"a": "tab\there"}', "broken or cut off"),
        (b'{"a": "\xff"}', r"byte 8 of the line \(0xff\) is not UTF-8; save the file as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),  # a surrogate written as UTF-8
        (b'{"a": ' + b"[" * 100_000, "broken or cut off at column 1 "),
        (b'{"a": 1},', r"column 9 \(Expecting value\)"),
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
    with pytest.raises(ValueError, match="is a directory without rows; name a file"):
        list(read_rows(tmp_path))
    with pytest.raises(ValueError, match="is empty"):
        list(read_rows(write(b"", b" ")))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: byte 1 of the line \(0xff\)"):
        list(read_rows(write(json.dumps(GOOD).encode("utf-16"))))


def test_a_line_without_an_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n{')
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match=r"rows.jsonl:2: over 64 MiB; is this JSONL"):
        list(read_rows(path))


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([GOOD, MORE]), path)
    assert list(read_rows(path)) == [(f"{path}:row 1", GOOD), (f"{path}:row 2", MORE)]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows.parquet: not a complete Parquet file after row 0"):
        list(read_rows(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_set_saved_by_hugging_face(tmp_path):
    saved = datasets.Dataset.from_list([GOOD, MORE, GOOD]).shuffle(seed=1)
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    first, second = (tmp_path / "saved" / f"data-0000{i}-of-00002.arrow" for i in range(2))
    places = [f"{first}:row 1", f"{first}:row 2", f"{second}:row 1"]
    assert list(read_rows(tmp_path / "saved")) == list(zip(places, saved, strict=True))
    assert count_rows(tmp_path / "saved") is None
    second.write_bytes(second.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"00001-of-00002.arrow: not a complete Arrow file after"):
        list(read_rows(tmp_path / "saved"))
    second.unlink()
    with pytest.raises(ValueError, match=r"00001-of-00002.arrow: is missing; save the data set"):
        list(read_rows(tmp_path / "saved"))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits: holds several splits; .* them: test, train$"):
        list(read_rows(tmp_path / "splits"))


@pytest.fixture
def downloaded(tmp_path) -> Path:
    """A directory of rows as the download leaves it: two shards and a manifest."""
    directory = tmp_path / "train"
    directory.mkdir()
    names = ("part-00000.parquet", "part-00001.parquet")
    for name, rows in zip(names, ([GOOD, MORE], [MORE]), strict=True):
        parquet.write_table(arrow.Table.from_pylist(rows), directory / name)
    files = [
        {
            "name": name,
            "bytes": (directory / name).stat().st_size,
            "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest(),
        }
        for name in names
    ]
    manifest = {"kind": "jaxsft rows", "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_downloaded_directory(downloaded):
    places = [where for where, _ in read_rows(downloaded)]
    first, second = (downloaded / f"part-0000{i}.parquet" for i in range(2))
    assert places == [f"{first}:row 1", f"{first}:row 2", f"{second}:row 1"]
    assert count_rows(downloaded) == 3


def test_directories_that_are_not_whole(downloaded):
    shard = downloaded / "part-00001.parquet"
    shard.unlink()
    with pytest.raises(ValueError, match=r"part-00001.parquet: missing or not as downloaded"):
        list(read_rows(downloaded))
    for files in ("7", "[{}]"):
        (downloaded / "manifest.json").write_text(f'{{"kind": "jaxsft rows", "files": {files}}}')
        with pytest.raises(ValueError, match=r"manifest.json: damaged; delete"):
            list(read_rows(downloaded))
    (downloaded / "manifest.json").write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="is not of downloaded rows"):
        list(read_rows(downloaded))
    (downloaded / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read as JSON"):
        list(read_rows(downloaded))


def test_digests_follow_the_file(write):
    file, known = RowFile(path := write(GOOD)), {}
    assert file_digest(file, known) == hashlib.sha256(path.read_bytes()).hexdigest()
    (key,) = known
    known[key][-1] = "kept"  # nothing about it has changed: not read again
    assert file_digest(file, known) == "kept"
    write(GOOD, GOOD)
    assert file_digest(file, known) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_changed_shard_is_not_as_downloaded(downloaded):
    file = row_files(downloaded)[1]
    assert file_digest(file, {}) == file.sha256
    data = bytearray(file.path.read_bytes())
    data[40] ^= 1
    file.path.write_bytes(data)  # of the same size
    with pytest.raises(ValueError, match=r"part-00001.parquet: missing or not as downloaded"):
        file_digest(file, {})


def test_links_are_followed_once_and_pipes_refused(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows", tmp_path / "other"
    rows.mkdir()
    other.mkdir()
    for path in (rows / "a.jsonl", other / "b.jsonl"):
        path.write_text('{"prompt": "p", "response": "r"}\n')
    (rows / "linked").symlink_to(other)
    (other / "back").symlink_to(rows)
    assert [file.path.name for file in row_files(rows)] == ["a.jsonl", "b.jsonl"]
    os.mkfifo(rows / "pipe")
    for path in (rows, rows / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            row_files(path)
