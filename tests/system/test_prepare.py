"""`python -m jaxsft.prepare`, the real command in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsft.prepared import open_prepared

Run = Callable[..., subprocess.CompletedProcess[str]]
GOOD = [
    {"prompt": f"What is {i} + {i}?", "response": f"<think>Twice {i}.</think>{2 * i}"}
    for i in range(1, 21)
]
BAD = [
    ({"prompt": "Why?", "response": "No thought."}, "no_thought"),
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
    assert done.stderr.startswith("error: rows.jsonl: 23.1% of the rows are left out, more than")
    assert "2 rejected: degenerate, as rows.jsonl:23" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["files.json"]
