"""Files of rows of every kind: what is read, what is refused, and what a hostile file can cost."""

import bz2
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet
import pytest

from jaxsft.config import named_files
from jaxsft.data.fields import UNREAD, Repeated
from jaxsft.data.json_rows import DeeplyNested
from jaxsft.data.sources import count_rows, read_rows, row_files

ROWS = [
    {"prompt": 'Say "one",\ntwo; three\t– ü', "response": "<think>a\r\nb</think>1"},
    {"prompt": "\u2028 \U0001f469", "response": ""},
    {"prompt": "http://127.0.0.1:9/x.png", "response": "file:///etc/passwd"},
]
TABLE = arrow.Table.from_pylist(ROWS)
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()


def csv_of(delimiter: str) -> bytes:
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row.values()] for row in ROWS]
    lines = [delimiter.join(row) for row in [["prompt", "response"], *quoted]]
    return ("\ufeff" + "\r\n".join(lines)).encode()


def bytes_of(write: Callable[..., object], *args: object, **options: object) -> bytes:
    sink = arrow.BufferOutputStream()
    write(*args, sink, **options)
    return sink.getvalue().to_pybytes()


def stream_of(table: arrow.Table, **options: object) -> bytes:
    sink = arrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "lines": LINES,
    "lines with a mark": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "array": json.dumps(ROWS).encode(),
    "pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "array, a row a line": b"[\n" + LINES.strip().replace(b"}\n", b"},\n") + b"\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "objects side by side": "".join(map(json.dumps, ROWS)).encode(),
    "lines, then pretty": LINES[: LINES.index(b"\n") + 1]
    + "\n\n".join(json.dumps(row, indent=1) for row in ROWS[1:]).encode(),
    "object with rows": json.dumps({"version": 1, "data": ROWS}).encode(),
    "csv": csv_of(","),
    "tsv": csv_of("\t"),
    "semicolons": csv_of(";"),
    "parquet": bytes_of(parquet.write_table, TABLE, compression="zstd"),
    "feather": bytes_of(feather.write_feather, TABLE, compression="lz4"),
    "arrow stream": stream_of(TABLE),
    "string views": stream_of(
        arrow.table({n: TABLE[n].cast(arrow.string_view()) for n in TABLE.column_names})
    ),
}
PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: arrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", ["", *PACKERS])
def test_the_same_rows_from_every_container(tmp_path, packed):
    path = tmp_path / "rows.bin"  # the name says nothing
    for name, data in CONTAINERS.items():
        path.write_bytes(PACKERS[packed](data) if packed else data)
        found = list(read_rows(path))
        assert [row for _, row in found] == ROWS, name
        assert all(re.fullmatch(r".*rows\.bin:(row )?\d+", where) for where, _ in found), name
        assert count_rows(path) == (len(ROWS) if name == "parquet" else None), name


def test_long_arrays_are_read_piece_by_piece(tmp_path):
    rows = [{"prompt": f"{i} ü" * (i * 97 % 4000), "response": "x"} for i in range(600)]
    (path := tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert path.stat().st_size > 4 * 2**20
    assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', [{"a": 1, "b": {"c": Repeated((1, 2))}}]),
        ('{"a": NaN, "b": [-Infinity]}', [{"a": float("nan"), "b": [float("-inf")]}]),
        ('{"a": ' + "9" * 5000 + "}", [{"a": float("inf")}]),
        ('{"a": "\\ud800"}', [{"a": "\ud800"}]),
        # What is no object is left to the converter, which counts it.
        ('null\n{"a": 1}\n[1, 2]\n"x"\n{"a": 2}', [None, {"a": 1}, [1, 2], "x", {"a": 2}]),
        ('[1, 2]\n{"a": 1}', [[1, 2], {"a": 1}]),
        ('["x", {"a": 1}, null]', ["x", {"a": 1}, None]),
        ('{"a": 1}\n' + "[" * 9999 + "]" * 9999 + '\n{"a": 2}', [{"a": 1}, DeeplyNested, {"a": 2}]),
        (
            "prompt,response\na,b,c\n\nd\n,",
            [list("abc"), {"prompt": "d"}, dict(ROWS[1], prompt="")],
        ),
        (",prompt,train\n0,5,False", [{"column 1": 0.0, "prompt": "5", "train": False}]),
        ("prompt,prompt\na,b", [{"prompt": Repeated("ab")}]),
        ("prompt\n" + "x" * 200_000, [{"prompt": "x" * 200_000}]),
    ],
)
def test_odd_rows(tmp_path, text, expected):
    (path := tmp_path / "rows").write_text(text)
    found = [row for _, row in read_rows(path)]
    found = [DeeplyNested if isinstance(row, DeeplyNested) else row for row in found]
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04..xl/workbook.xml", "is an Excel workbook or Office document; save its sheet"),
        (b"PK\x03\x04", "is a ZIP archive; unpack it"),
        (gzip.compress(b"x" * 257 + b"ustar"), "is a tar archive; unpack it"),
        (b"\x80\x04\x95", "is a pickle, which can run code; save the rows as JSONL"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file"),
        (b"\n <!DOCTYPE html>", "is a web page or XML, not rows"),
        (b"%PDF-1.7", "is a PDF document"),
        (
            b"\xff\xfep\x00",
            r":1: byte 1 of the line \(0xff\) is not UTF-8 but the beginning of UTF-16",
        ),
        (b"a,b\n\0", "is no file of rows, but binary"),
        (gzip.compress(gzip.compress(LINES)), "is compressed twice"),
        (gzip.compress(LINES)[:-9], ":1: the gzip data is broken or cut off"),
        (
            arrow.compress(LINES, "zstd", asbytes=True)[:-3],
            ":1: the zstd data is broken or cut off",
        ),
        (CONTAINERS["feather"][:-200], "not a complete Arrow file after row 0"),
        (CONTAINERS["arrow stream"][:-200], "not a complete Arrow file after row 0"),
        (
            b"Just some words.\n",
            ":1: is neither JSON, Parquet nor Arrow, and as CSV it has no header",
        ),
        (b'prompt,response\n"a,b\n', ":2: broken or cut off CSV"),
        (b'prompt,response\n"say "x"",b\n', ":2: broken or cut off CSV"),
        (b"prompt,response\na,\xff\n", r":2: byte 3 of the line \(0xff\) is not UTF-8"),
        (b'[{"a": 1}, {"a": 2}', r":1: broken or cut off at column 20 \(Expecting '\]'\)"),
        (b'{\n "a": 1\n "b": 2\n}', r":1: broken or cut off at line 2, column 8 "),
        (b'{\n "a": 1\n}\n{\n "a": "\xff"}', r":5: byte 8 of the line \(0xff\) is not UTF-8"),
        (
            b'{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
            'lists of rows \\("train", "test"',
        ),
    ],
)
def test_refused_files(tmp_path, data, message):
    (path := tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:") and "\n" not in str(caught.value)


# Values of each type in a column that is not known, and in one that is always read.
TYPES = {
    "map": (
        [[("k", "v")]],
        arrow.map_(arrow.string(), arrow.string()),
        [{"key": "k", "value": "v"}],
    ),
    "list": ([["a", None]], arrow.large_list(arrow.large_string()), ["a", None]),
    "pair": ([["a", "b"]], arrow.list_(arrow.string(), 2), ["a", "b"]),
    "chat": ([[{"role": "u", "weight": 0}]], None, [{"role": "u", "weight": 0}]),
    "dictionary": (["a"], arrow.dictionary(arrow.int8(), arrow.string()), "a"),
    "null": ([None], None, UNREAD),
    "bytes": ([b"a"], None, UNREAD),
    "number": ([1], None, UNREAD),
    "time": ([1], arrow.timestamp("ns", "Mars/Phobos"), UNREAD),
    "media": ([{"bytes": b"a", "path": "http://127.0.0.1:9/x"}], None, UNREAD),
}


@pytest.mark.parametrize("write", [parquet.write_table, feather.write_feather])
def test_columns_of_every_type(tmp_path, write):
    arrays = {name: arrow.array(values, kind) for name, (values, kind, _) in TYPES.items()}
    rest = {"tags": ["a"], "prompt": ["p"], "messages": arrays["chat"]}
    write(arrow.table(arrays | rest), path := tmp_path / "rows")
    [(_, row)] = read_rows(path)
    expected = {name: value for name, (_, _, value) in TYPES.items()}
    assert row == expected | {
        "tags": UNREAD,
        "prompt": "p",
        "messages": [{"role": "u", "weight": 0}],
    }
    [(_, row)] = read_rows(path, {"prompt": "number"})
    assert row == dict.fromkeys(row, UNREAD) | {"number": 1}
    [(_, row)] = read_rows(path, {"prompt": "a column of another file"})
    assert row["prompt"] == "p"


def test_types_of_arrow_alone(tmp_path):
    kinds = [arrow.array(["a", "b", "c"]), arrow.array([1, 2, 3])]
    runs = arrow.RunEndEncodedArray.from_arrays(arrow.array([2, 3]), arrow.array(["a", "b"]))
    table = arrow.table(
        {
            "union": arrow.UnionArray.from_sparse(arrow.array([0, 1, 0], arrow.int8()), kinds),
            "views": arrow.array([["a"], [], None], arrow.list_view(arrow.string())),
            "runs": runs,
            "prompt": ["p", "q", "r"],
        }
    )
    path = tmp_path / "rows"
    path.write_bytes(stream_of(table.slice(1), compression="zstd"))
    rows = [dict(union=UNREAD, views=UNREAD, runs=run, prompt=p) for run, p in ("aq", "br")]
    assert [row for _, row in read_rows(path)] == rows


def hostile_files(directory: Path) -> dict[str, str | None]:
    """Small files that would take gigabytes -> the error, None where they can be read."""
    n, big = 512, "a" * 2**22
    shared = arrow.DictionaryArray.from_arrays(arrow.array([0] * n, arrow.int32()), [big])
    lists = arrow.ListArray.from_arrays(arrow.array([0, n], arrow.int32()), shared)
    nulls = arrow.nulls(2**23, arrow.string())
    nulls = arrow.ListArray.from_arrays(arrow.array([0, 2**23], arrow.int32()), nulls)
    texts = ["x"] * n
    tables = {
        "shared.parquet": ({"prompt": shared, "response": texts}, None),
        "unread.parquet": ({"prompt": texts, "id": shared}, None),
        "list.parquet": ({"messages": lists}, "row 1: over 64 MiB"),
        "nulls.parquet": ({"messages": nulls}, "row 1: over 64 MiB"),
        "shared.feather": ({"prompt": shared, "response": texts}, None),
        "unread.feather": ({"prompt": texts, "id": [big] * 32 + [""] * (n - 32)}, None),
        "texts.feather": ({"prompt": [big] * 48}, "192 MiB in memory; rows do not compress"),
    }
    for name, (columns, _) in tables.items():
        table = arrow.table(columns)
        if name.endswith("parquet"):
            parquet.write_table(table, directory / name, dictionary_pagesize_limit=2**30)
        else:
            feather.write_feather(table, directory / name, compression="zstd")
    texts_of = {
        "line.gz": (b'{"a": "', 70, ":1: over 64 MiB"),
        "array.gz": (b'[{"a": "', 70, ":1: over 64 MiB"),
        "csv.gz": (b'a,b\n"', 70, ":2: over 64 MiB"),
        "parquet.gz": (b"PAR1", 140, "rows do not compress like that"),
    }
    for name, (start, size, _) in texts_of.items():
        with gzip.open(directory / name, "wb", 1) as file:
            file.write(start)
            for _ in range(size):
                file.write(bytes(2**20) if name == "parquet.gz" else b"a" * 2**20)
    return {name: error for name, (*_, error) in (tables | texts_of).items()}


PEAK = """
import re, sys
from jaxsft.data.sources import read_rows
for path in sys.argv[1:]:
    try:
        print(sum(1 for _ in read_rows(path)))
    except ValueError as error:
        print(error)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_no_file_takes_more_memory_than_its_bytes_explain(tmp_path):
    expected = hostile_files(tmp_path)
    assert all(os.path.getsize(tmp_path / name) < 2**20 for name in expected)
    files = [str(tmp_path / name) for name in expected]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files], capture_output=True, text=True, check=True
    )
    *found, peak = done.stdout.splitlines()
    for (name, error), line in zip(expected.items(), found, strict=True):
        assert (line == "512") if error is None else (error in line), (name, line)
    assert int(peak) < 600 * 2**10


BLOCKED = """
import sys
import pyarrow.feather, jaxsft.data.ipc_rows, jaxsft.data.parquet_rows
from jaxsft.data.sources import read_rows
allowed = (sys.prefix, sys.base_prefix, sys.argv[1])
def audit(event, args):
    if event.startswith("socket.") or event == "open" and not str(args[0]).startswith(allowed):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(audit)
for path in sys.argv[2:]:
    assert list(read_rows(path))
assert "datasets" not in sys.modules
"""


def test_no_row_causes_a_request_or_opens_a_file(tmp_path):
    deep = "[" * 100_000
    features = {
        "image": {"_type": "Image"},
        "audio": {"_type": "Audio", "sampling_rate": 16000},
        "prompt": {"dtype": "string", "_type": "Value"},
    }
    media = {"bytes": None, "path": "http://127.0.0.1:9/x.wav"}
    rows = [{"image": media, "audio": media, "prompt": media["path"], "context": [media]}]
    table = arrow.Table.from_pylist(rows)
    for name, info in (
        ("declared", json.dumps({"info": {"features": features}})),
        ("deep", '{"info": {"features": ' + deep),
    ):
        hostile = table.replace_schema_metadata({"huggingface": info, "pandas": deep})
        (tmp_path / f"{name}.arrow").write_bytes(stream_of(hostile))
        parquet.write_table(hostile, tmp_path / f"{name}.parquet")
        feather.write_feather(hostile, tmp_path / f"{name}.feather")
        (tmp_path / f"{name}.json").write_text(json.dumps(rows * 2))
        (tmp_path / f"{name}.csv").write_text("prompt,image\nhttp://127.0.0.1:9/x,/etc/passwd\n")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path), *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_directories_and_patterns(tmp_path):
    def write(name: str) -> Path:
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINES)
        return path

    names = ("set/README.md", "set/.cache/x.jsonl", "set/dataset_infos.json", "set/LICENSE")
    parts = [write(f"set/{name}") for name in ("2.jsonl", "10.json", "more/1.gz")]
    for name in (*names, "set/_SUCCESS"):
        write(name)
    found = lambda path: [file for file, _ in row_files(path)]  # noqa: E731
    assert found(tmp_path / "set") == parts
    assert found(tmp_path / "set" / "**") == parts
    assert found(tmp_path / "set" / "*.json*") == parts[:2]
    assert found(tmp_path / "s[e]t") == parts
    odd = write("a,b[1].jsonl")  # is there, so it is no list and no pattern
    assert found(odd) == [odd] and named_files(str(odd)) == [str(odd)]
    assert named_files("a.jsonl, b[,]*.csv,") == ["a.jsonl", "b[,]*.csv"]
    with pytest.raises(ValueError, match=r"\*.csv: matches no file of rows"):
        row_files(tmp_path / "*.csv")
    write("repo/data/train-0.jsonl"), write("repo/data/test-0.jsonl")
    for path in ("repo", "repo/data/*.jsonl"):
        with pytest.raises(ValueError, match=r"several splits \(.*test-0.jsonl, .*train-0.jsonl\)"):
            row_files(tmp_path / path)
    write("sets/one/manifest.json")
    with pytest.raises(ValueError, match=r"sets: holds sets of rows of their own; .*sets/one$"):
        row_files(tmp_path / "sets")
    write("cut/unfinished.json")
    with pytest.raises(ValueError, match=r"cut: its download is not finished"):
        row_files(tmp_path / "cut")
