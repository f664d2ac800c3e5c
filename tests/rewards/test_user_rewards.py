"""A user's own rewards: whatever a function does, the run goes on and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.rewards.records import Completion, Reward, Task
from jaxsft.rewards.scorer import Scorer
from jaxsft.rewards.user_rewards import UserFile, UserReward, find_user_rewards

REWARDS = """
import os, sys, time
import beside
print("loaded")
def brevity(texts, rows): return [1 - len(text) / 10 for text in texts]
def of_row(texts, rows): return [row["value"] for row in rows]
def array(texts, rows):
    import numpy
    return numpy.arange(len(texts), dtype="float32")
def mixed(texts, rows): return [None, float("nan"), "1.0", True]
def infinite(texts, rows): return [float("inf"), -1e300, 10 ** 400, 1 + 2j]
def chatty(texts, rows):
    print('{"values": [9, 9, 9, 9]}', flush=True)
    os.write(2, b"\\x1b[31m red"), sys.stdin.read()
    return beside.HALF * len(texts)
def loop(texts, rows):
    while True: pass
def flood(texts, rows):
    while True: print("y" * 1000)
def stops(texts, rows): os.kill(os.getpid(), 19)
def killed(texts, rows): os.kill(os.getpid(), 9)
def leaves(texts, rows): os._exit(3)
def exits(texts, rows): sys.exit("bye")
def raises(texts, rows): return [1 / 0]
def interrupts(texts, rows): raise KeyboardInterrupt
def short(texts, rows): return [1.0]
def clears(texts, rows): texts.clear(); return []
def word(texts, rows): return "1234"
def nothing(texts, rows): pass
def endless(texts, rows): return iter(int, 1)
def lazy(texts, rows): return (1 / i for i in (1, 0, 1, 1))
def late(texts, rows): import late_module; return [1.0] * len(texts)
def leaves_a_child(texts, rows):
    if os.fork() == 0: time.sleep(600)
    with open(rows[0]["pids"], "a") as file: file.write(f"{os.getpid()}\\n")
    return [0.25] * len(texts)
"""
FAILS = {
    "loop": "took over 0.4 s", "flood": "took over 0.4 s", "stops": "took over 0.4 s",
    "killed": "ended its process (exit code -9)", "leaves": "ended its process (exit code 3)",
    "exits": "SystemExit: bye", "interrupts": "KeyboardInterrupt",
    "raises": "ZeroDivisionError: division by zero",
    "short": "returned 1 values for 4 texts", "clears": "returned 0 values for 4 texts",
    "endless": "returned more than 4 values for 4 texts",
    "word": "returned a str, not a list of numbers",
    "nothing": "returned a NoneType, not a list of numbers",
    "late": "ImportError: late_module is imported in a call: import it in the file",
    "lazy": "ZeroDivisionError: division by zero",
}  # fmt: skip
TEXTS = ["", "a", "\u200bb\x00", "\ud800"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("HALF = [0.5]\n")
    (tmp_path / "late_module.py").write_text("")
    return tmp_path


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def call(folder: Path, log: list[str]) -> Iterator:
    names = [line.split("(")[0][4:] for line in REWARDS.splitlines() if line.startswith("def ")]
    found = [UserReward(f"my_rewards.py:{name}", name) for name in names]
    with UserFile(folder / "my_rewards.py", found, 0.4, log.append) as file:
        rows = [{"value": i / 4, "pids": str(folder / "pids")} for i in range(4)]

        def score(name: str) -> list[Reward | None]:
            file._seconds = 0.4 if FAILS.get(name, "").startswith("took") else 600.0
            file._rewards = [each for each in found if each.function == name]
            return file.score(TEXTS, rows)[f"my_rewards.py:{name}"]

        yield score


def values(rewards: list[Reward | None]) -> list[float | None]:
    return [each and each.value for each in rewards]


def test_numbers_are_taken_as_they_are(call, log: list[str]) -> None:
    assert log == ["my_rewards.py printed: loaded"]
    assert values(call("brevity")) == [1.0, 0.9, 0.7, 0.9]
    assert call("of_row")[1] == Reward(0.25, "0.25")
    assert values(call("array")) == [0.0, 1.0, 2.0, 3.0]
    assert call("mixed")[0] is None and call("mixed")[3] == Reward(1.0, "1")
    assert values(call("mixed"))[1:3] == [0.0, 0.0]
    assert values(call("infinite")) == [0.0] * 4
    assert "returned nan: 2 completions score 0" in log[1]


def test_what_a_function_prints_is_no_reply_and_steers_no_terminal(call, log: list[str]) -> None:
    assert values(call("chatty")) == [0.5] * 4
    assert log[-1] == 'my_rewards.py printed: {"values": [9, 9, 9, 9]} \\u{1b}[31m red'


def test_a_call_that_fails_scores_0_and_the_next_one_works(call, log: list[str]) -> None:
    for name, why in FAILS.items():
        if why.startswith(("System", "Keyboard", "Zero")):  # these say where
            source = next(i for i, x in enumerate(REWARDS.splitlines(), 1) if f"def {name}(" in x)
            why += f" (line {source})"
        assert call(name) == [Reward(0.0, why)] * 4
        assert log[-1] == f"reward my_rewards.py:{name}: {why}: 4 completions score 0"
        assert values(call("brevity")) == [1.0, 0.9, 0.7, 0.9]


def test_a_file_that_changes_during_the_run_is_not_loaded_again(call, folder: Path) -> None:
    (folder / "my_rewards.py").write_text(REWARDS + "\n")
    assert values(call("brevity")) == [1.0, 0.9, 0.7, 0.9]
    assert values(call("killed")) == [0.0] * 4
    assert "my_rewards.py was changed during the run" in call("brevity")[0].reason
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "beside.py").write_text("HALF = [1.0]\n")
    assert "beside.py was changed during the run" in call("brevity")[0].reason


def test_no_process_is_left(call, folder: Path) -> None:
    assert values(call("leaves_a_child")) == [0.25] * 4
    group = int((folder / "pids").read_text())
    assert values(call("killed")) == [0.0] * 4
    while _is_alive(group):  # a killed process may take a moment
        time.sleep(0.01)


def _is_alive(group: int) -> bool:
    """Whether a process of the group runs; one that nobody has waited for does not."""
    listed = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True)
    return any(not each.startswith("Z") for each in listed.stdout.split())


def test_a_run_that_is_killed_leaves_no_function_that_hangs(folder: Path) -> None:
    (folder / "pid.py").write_text(
        "import os\ndef hang(texts, rows):\n"
        f"    open({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\n    while True: pass\n"
    )
    program = (
        "from pathlib import Path\nfrom jaxsft.rewards import user_rewards as u\n"
        f"path = Path({str(folder / 'pid.py')!r})\n"
        "with u.UserFile(path, [u.UserReward('pid.py:hang', 'hang')], 0.2) as file:\n"
        "    print('ready', flush=True)\n    file.score(['a'], [{}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        while not (folder / "pid").exists() or not (folder / "pid").read_text():
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
    while _is_alive(int((folder / "pid").read_text())):
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax (line 1)"),
        ("\nraise OSError('no')", "OSError: no (line 2)"),
        ("import sys; sys.exit(2)", "SystemExit: 2"),
        ("import os; os._exit(4)", "ended its process (exit code 4)"),
        ("import nonexistent_module", "No module named 'nonexistent_module'"),
        ("def g(texts, rows): 1\nf = 5", "no such function"),
        ("def f(completions, **kwargs): 1", "called as f(texts, rows)"),
        ("", "has none"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, source: str, said: str
) -> None:
    (tmp_path / "odd.py").write_text(source)
    with (
        pytest.raises(ValueError) as error,
        Scorer({f"{tmp_path}/odd.py:f": 1.0}, AnswerTemplate()),
    ):
        pass
    line = str(error.value)
    assert line.startswith(f"rewards: {tmp_path}/odd.py:f: ") and said in line
    assert "\n" not in line and len(line) < 600


def test_where_a_file_is_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder / "work"
    other.mkdir()
    monkeypatch.chdir(other)
    name = "my_rewards.py:brevity"
    assert find_user_rewards([name], folder) == {
        folder / "my_rewards.py": [UserReward(name, "brevity")]
    }
    with pytest.raises(ValueError, match="no file") as error:
        find_user_rewards(["none.py:f"], folder)
    assert str(other / "none.py") in str(error.value) and str(folder / "none.py") in str(
        error.value
    )
    (other / "my_rewards.py").write_text(REWARDS)
    both = [name, "my_rewards.py:array"]
    assert {p: len(found) for p, found in find_user_rewards(both, folder).items()} == {
        other / "my_rewards.py": 2
    }
    for odd in ("my_rewards.py:", ":f", "my_rewards.py:1f", "my_rewards.py:a b"):
        with pytest.raises(ValueError, match="must be FILE"):
            find_user_rewards([odd], folder)


def test_own_rewards_count_beside_the_built_in_ones(folder: Path) -> None:
    template, row = AnswerTemplate(), {"prompt": "q", "kind": "poem", "value": 0.5}
    tasks = [
        Task("q", "number", "72", (), "", {"value": None}),
        Task("q", "poem", None, (), "", row),
    ]
    text = template.join("There are 48 and 24 of them.", "72")
    name = f"{folder}/my_rewards.py:of_row"
    with Scorer({"answer": 1.0, name: -0.5, "format": 0.2}, template) as scorer:
        found = scorer(tasks, [Completion(text, True)] * 2)
        assert [list(each) for each in found] == [["answer", "format"], [name, "format"]]
        assert [round(scorer.total(each), 9) for each in found] == [1.2, -0.05]
        beside = folder / "my_rewards.py", folder / "beside.py"
        assert list(scorer.user_files) == [str(each) for each in beside]
        json.dumps(scorer.user_files)
