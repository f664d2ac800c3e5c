"""`python -m jaxsft.prepare`, the real command in a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsft.data.prepared import open_prepared
from jaxsft.prepare.__main__ import main

Run = Callable[..., subprocess.CompletedProcess[str]]
GOOD = [
    {"prompt": f"What is {i} + {i}?", "response": f"<think>Twice {i}.</think>{2 * i}"}
    for i in range(1, 21)
]
BAD = [
    ({"prompt": "Why?", "response": "So.", "hint": "Say why."}, "unused_text"),
    ({"prompt": "Why?", "response": "<think>open"}, "unclosed_thought"),
    ({"prompt": "Why?", "response": "<think>Hm.</think>I hope this helps!"}, "degenerate"),
    ({"prompt": "Why?", "response": f"<think>{'Wait. ' * 300}</think>So."}, "degenerate"),
    (GOOD[0], "duplicate"),
    (
        {"prompt": "Is this the one that is held out?", "response": "<think>a</think>b"},
        "contaminated",
    ),
]


@pytest.fixture
def run(tiny_model_dir: Path, command_environment: dict[str, str], tmp_path: Path) -> Run:
    def run_command(*options: str) -> subprocess.CompletedProcess[str]:
        fixed = ("--model.path", str(tiny_model_dir), "--data.prepared_dir", "sets")
        files = ("--data.train_files", "rows.jsonl", "--data.eval_files", "heldout.jsonl")
        return subprocess.run(
            [sys.executable, "-m", "jaxsft.prepare", *fixed, *files, *options],
            cwd=tmp_path,
            env=command_environment | {"PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
        )

    lines = GOOD + [row for row, _ in BAD]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    heldout = {"prompt": BAD[-1][0]["prompt"], "response": "<think>c</think>d"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(heldout) + "\n")
    return run_command


def test_every_row_is_accounted_for(run: Run, tmp_path: Path) -> None:
    done = run("--data.max_drop", "0.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 26 rows read, 20 kept (76.9%)" in done.stdout
    assert "held out: 1 rows read, 1 kept" in done.stdout
    for number, (_, reason) in enumerate(BAD, 21):
        line = next(line for line in done.stdout.splitlines() if f"rejected: {reason}," in line)
        assert f"rows.jsonl:{number} (" in line
    again = run("--data.max_drop", "0.3")
    assert again.stdout == done.stdout
    directories = [Path(line.removeprefix("in ")) for line in done.stdout.splitlines()[-2:]]
    found = open_prepared(tmp_path / directories[0])
    assert found.rows.num_samples == 20 and len(list((tmp_path / "sets").iterdir())) == 3


def test_too_many_lost_rows_stop_it(run: Run, tmp_path: Path) -> None:
    done = run("--data.max_drop", "0.2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: rows.jsonl: 23.1% of 26 rows are left out, more than")
    assert "2 degenerate, as rows.jsonl:23" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["files.json"]


def row(**fields: object) -> bytes:
    return json.dumps({"prompt": "Why?", "response": "<think>r</think>a"} | fields).encode()


# (second line of the file, what the command says of it); test_rows.py and test_sources.py have all
BAD_LINES = [
    (b'{"prompt": "Why?", "resp', "rows.jsonl:2: broken or cut off at column 20"),
    (row() + b"\xff", r"rows.jsonl:2: byte \d+ of the line \(0xff\) is not UTF-8"),
    (
        row(prompt="Why? " * 200),
        r"rows.jsonl:2 \([\d,]+ tokens, limit 256\): too long; raise max_l",
    ),
    # A row that is left out, here half of them.
    (row(response=""), r"empty_answer, as .*rows.jsonl:2 \(the response is empty\)"),
    (row(response="\ud83d"), r'wrong_field, as .*rows.jsonl:2 \("response" holds a lone surrogate'),
    (b'["Why?", "So."]', r"unknown_fields, as .*rows.jsonl:2 \(is a list, not an object"),
]


@pytest.fixture
def refuse(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    def refuse_file(name: str) -> str:
        """The one line with which the command refuses a file; nothing may be left of it."""
        sets = tmp_path / "sets"
        files = ("--data.train_files", str(tmp_path / name), "--data.eval_files", "[]")
        fixed = ("--model.path", str(tiny_model_dir), "--data.prepared_dir", str(sets))
        options = ("--data.max_length", "256", "--data.overlong", "raise", "--data.max_drop", "0.4")
        code = main([*fixed, *files, *options])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 600
        assert [path.name for path in sets.glob("*") if path.name != "files.json"] == []
        return err

    return refuse_file


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES, ids=[c[:30] for _, c in BAD_LINES])
def test_bad_lines(
    line: bytes, complaint: str, refuse: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(row(prompt="First.") + b"\n" + line + b"\n")
    assert re.search(complaint, refuse("rows.jsonl"))


def test_bad_files(refuse: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n \n")
    assert "rows.jsonl: is empty" in refuse("rows.jsonl")
    assert "absent.jsonl: cannot be read (No such file" in refuse("absent.jsonl")
