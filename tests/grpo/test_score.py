"""Completions of a file are scored without a model: a table for people, a JSON line a row."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather, parquet

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.rows import DEFAULTS, RowOptions
from jaxsft.data.sources import read_rows
from jaxsft.grpo.__main__ import main
from jaxsft.grpo.score import score_file
from jaxsft.rewards.records import Task
from jaxsft.rewards.scorer import Scorer
from jaxsft.rewards.tasks import is_for_training, read_task

WEIGHTS = {"format": 0.2, "answer": 1.0, "tests": 1.0}
THOUGHT = "Half of the 48 clips is 24 clips."


def formatted(answer: str) -> str:
    return AnswerTemplate().join(THOUGHT, answer)


GSM8K = {"question": "How many clips?", "answer": "48+24=72\n#### 72"}
MBPP = {"text": "Write f.", "code": "", "test_setup_code": "", "task_id": 7}
MBPP |= {"test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]}
ROWS: list[dict[str, Any]] = [
    GSM8K | {"completion": formatted("72 clips")},
    GSM8K | {"completion": formatted("72 or 73") + "<end_of_turn>\n"},
    GSM8K | {"completion": formatted("72"), "stopped": False},
    GSM8K | {"completion": "<reasoning></reasoning><answer></answer>", "stopped": True},
    GSM8K,
    MBPP | {"completion": formatted("```python\ndef f(x):\n    return min(x + 1, 3)\n```")},
    {"prompt": "hm", "completion": formatted("72")},
    GSM8K | {"completion": 72},
    GSM8K | {"completion": formatted("72"), "stopped": "no"},
    {"prompt": "Which day?", "answer": "Tuesday", "completion": formatted("**tuesday**.")},
]


def score(path: Path, capsys: Any, as_json: bool, how: RowOptions = DEFAULTS) -> str:
    with Scorer(WEIGHTS, AnswerTemplate()) as scorer:
        assert score_file(path, scorer, how, as_json=as_json) == 0
    return capsys.readouterr().out


def test_a_json_line_for_each_row(write: Callable[..., Path], capsys: Any) -> None:
    lines = [json.loads(line) for line in score(write(*ROWS), capsys, True).splitlines()]
    assert lines[0] == {
        "reward": 1.2,
        "rewards": {
            "format": {"value": 0.2, "reason": "in the format"},
            "answer": {"value": 1.0, "reason": "right"},
        },
    }
    assert [line.get("reward") for line in lines] == [
        *(1.2, 0.2, 0.0, 0.0, None, 0.7, None, None, None, 1.2)
    ]
    assert lines[1]["rewards"]["answer"]["reason"] == "the answer has 2 numbers"
    assert lines[2]["rewards"]["format"]["reason"] == "not ended by the stop token"
    assert list(lines[5]["rewards"]) == ["format", "tests"]
    assert [line["error"] for line in lines if "error" in line] == [
        '"completion" is missing or null',
        'no answer and no tests in "prompt": name the column of the answer with data.columns '
        "(response), or give the row a kind for a reward of your own",
        '"completion" is a int, not a text',
        '"stopped" must be true or false',
    ]


def test_a_table_for_people(write: Callable[..., Path], capsys: Any) -> None:
    rows = [*ROWS, GSM8K | {"completion": "\x1b[31mred", "question": "q\x1b[2J" + "w" * 100}]
    out = score(write(*rows), capsys, False)
    assert "How many clips?" in out and "the answer has 2 numbers" in out
    assert "\x1b" not in out and "w" * 80 not in out
    assert "7 rows scored, reward 0.4714, format 0.5714, answer 0.3333 of 6 rows" in out
    assert "4 rows not scored" in out and ':5: "completion" is missing' in out


def test_a_file_without_a_row_to_score_is_refused(write: Callable[..., Path], capsys: Any) -> None:
    for rows in ([GSM8K], ROWS[6:9], [[1, 2]]):
        with pytest.raises(ValueError, match=r"rows.jsonl: no row can be scored: .*1: "):
            score(write(*rows), capsys, True)
    with pytest.raises(ValueError, match=r"rows.jsonl:2"):  # nothing is printed before it
        score(write(ROWS[0], b'{"question": '), capsys, True)
    assert capsys.readouterr().out == ""


def test_columns_that_the_user_names(write: Callable[..., Path], capsys: Any) -> None:
    how = RowOptions(columns={"prompt": "task", "response": "right"})
    path = write({"task": "q", "right": 5, "completion": formatted("5"), "stopped": None})
    assert json.loads(score(path, capsys, True, how))["reward"] == 1.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json",), "--json is for --score FILE"),
        (("--score", "a.jsonl", "--page", "run"), "two jobs"),
        (("--score", "a.jsonl", "--reward.code_seconds", "-5"), "must be above 0"),
        (("--score", "a.jsonl", "--reward.min_reasoning_words", "-1"), "must be 0 or above"),
    ],
)
def test_options_that_do_not_go_together(options: Any, words: str, capsys: Any) -> None:
    assert main(["--config", "grpo_gsm8k", *options]) == 2
    assert words in capsys.readouterr().err


def test_scoring_imports_no_jax() -> None:
    program = "import sys, jaxsft.grpo.score; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_command_scores_with_a_recipe_that_is_no_whole_run(
    write: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    own = "def half(texts, rows): return [0.5] * len(texts)\n"
    (tmp_path / "my_rewards.py").write_text(own)
    recipe = tmp_path / "config.yaml"  # the file of the reward is beside it
    recipe.write_text("rewards: {format: 0.2, answer: 1.0, my_rewards.py:half: 0.1}\n")
    rows = write(ROWS[0])
    argv = ["--config", str(recipe), "--score", str(rows), "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["reward"] == 1.25
    # The same file, as a run's own: no code is taken from it.
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(argv) == 2
    assert "is of another run, whose code is not taken" in capsys.readouterr().err
    assert main([*argv, "--rewards.format", "1"]) == 2  # which leaves the others
    assert main(["--rewards", "answer", *argv]) == 2  # which the file overrides
    capsys.readouterr()
    named = f"{{format: 0.2, {tmp_path}/my_rewards.py:half: 0.1}}"
    assert main([*argv, "--rewards", named]) == 0
    assert json.loads(capsys.readouterr().out)["reward"] == 0.25


def test_rewards_that_cannot_be_had_are_one_line(
    write: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    argv = ["--config", "grpo_gsm8k", "--score", str(write(ROWS[0])), "--rewards"]
    for rewards, said in (("fromat", "did you mean format?"), ("no.py:f", "there is no file")):
        assert main([*argv, rewards]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: rewards: ") and err.count("\n") == 1
        assert said in err


def test_columns_of_numbers_in_a_table_are_read(
    write: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """Parquet and Arrow files say the type of a column; a stop, an id, a right number count too."""
    row = {"prompt": "q", "final_answer": 5, "completion": formatted("5"), "level": 0.5}
    table = pyarrow.Table.from_pylist([row | {"stopped": True}, row | {"stopped": False}])
    table = table.append_column("image", pyarrow.array([b"x", b"y"]))
    parquet.write_table(table, tmp_path / "rows.parquet")
    feather.write_feather(table, tmp_path / "rows.arrow")
    (tmp_path / "my.py").write_text(
        "def level(texts, rows): return [row['level'] * ('image' not in row) for row in rows]\n"
    )
    weights = {"answer": 1.0, f"{tmp_path}/my.py:level": 1.0}
    how = RowOptions(columns={"prompt": "prompt", "response": "final_answer"})
    for name in ("rows.parquet", "rows.arrow"):
        with Scorer(weights, AnswerTemplate()) as scorer:
            for options in (DEFAULTS, how):
                assert score_file(tmp_path / name, scorer, options, as_json=True) == 0
                lines = map(json.loads, capsys.readouterr().out.splitlines())
                assert [line["reward"] for line in lines] == [1.5, 0.5]
    mbpp = MBPP | {"task_id": 7}
    parquet.write_table(pyarrow.Table.from_pylist([mbpp]), tmp_path / "mbpp.parquet")
    ((_, found),) = read_rows(tmp_path / "mbpp.parquet", whole=True)
    task = read_task(found)
    assert isinstance(task, Task) and not is_for_training(task)
