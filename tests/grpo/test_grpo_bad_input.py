"""Mistakes of the user: exit code 2, one line that says what and where, nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jaxsft.cli import EXIT_BAD_INPUT
from jaxsft.grpo.__main__ import main

Refuse = Callable[..., str]
GOOD_ROW = {"prompt": "What is 2 + 3?", "answer": 5}


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A directory with all that a run needs: config.yaml and rows.jsonl."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    (tmp_path / "mine.py").write_text("def good(texts, rows):\n    return [0.0] * len(texts)\n")
    config = {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir)},
        "data": {"train_files": [str(tmp_path / "rows.jsonl")], "max_length": 160},
        "rollout": {"max_new_tokens": 16},
        "lora": {"r": 2},
        "max_steps": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def refuse(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuse:
    monkeypatch.chdir(files)

    def there() -> set[Path]:
        return {path for path in files.rglob("*") if "__pycache__" not in path.parts}

    def refuse(*options: str, config: str = "config.yaml") -> str:
        """The line with which the command refuses; it must have left nothing behind."""
        before = there()
        code = main(["--config", config, *options])
        err = capsys.readouterr().err
        assert code == EXIT_BAD_INPUT == 2
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        assert len(err) <= 600
        assert there() == before
        return err

    return refuse


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rewards", "{anwser: 1}"], "there is no reward 'anwser'; did you mean answer?"),
        (["--rewards", "{mine.py: 1}"], "mine.py:FUNCTION"),
        (["--rewards", "{mine.py:god: 1}"], "god"),
        (["--rewards", "{gone.py:good: 1}"], "gone.py"),
        (["--rewards", "{}"], "none has a weight"),
        (["--rewards", "{format: 0}"], "none has a weight"),
        (["--rewards", "{answer: .nan}"], "finite"),
        (["--rewards", "{answer: -1}"], "at least 0"),
        (["--rewards", "{answer: much}"], "much"),
        (["--data.train_files", "[]"], "data.train_files is empty"),
        (["--data.train_files", "gone.jsonl"], "gone.jsonl"),
        (["--data.eval_files", "gone.jsonl"], "gone.jsonl"),
        (["--rollout.num_generations", "1"], "2 or above"),
        (["--rollout.temperature", "0.9"], "rollout.temperature 0.9 changes the distribution"),
        (["--rollout.top_k", "50"], "rollout.top_k 50 changes the distribution"),
        (["--rollout.max_new_tokens", "160"], "leaves no room for a prompt"),
        (["--rollout.max_new_tokens", "159"], "too_long"),
        (["--objective.num_iterations", "3"], "max_steps 2 is not a multiple"),
        (["--objective.loss_type", "gspo"], "gspo"),
        (["--rewards", "[answer, format, answer]"], "rewards names answer twice"),
        (["--rewards", '{"mine.py:good": 1, "./mine.py:good": 2}'], "mine.py:good twice"),
        (["--lora.dropout", "0.1"], "lora.dropout"),
        (["--global_batch_size", "8"], "global_batch_size"),
        (["--score", "gone.jsonl"], "gone.jsonl"),
        (["--score", "rows.jsonl"], "no row can be scored"),
        (["--page", "runs/gone"], "runs/gone"),
        (["--page", "."], "rollouts.jsonl"),
        (["--fork-from", "gone"], "gone"),
        (["--max-seconds", "5"], "leaves"),
    ],
)
def test_options(options: list[str], complaint: str, refuse: Refuse) -> None:
    assert complaint in refuse(*options)


def test_a_recipe_of_another_command_is_refused(files: Path, refuse: Refuse) -> None:
    assert "is a recipe of python -m jaxsft.train" in refuse(config="single_session")
    train = {"global_batch_size": 4, "data": {"train_files": ["rows.jsonl"], "packing": False}}
    (files / "train.yaml").write_text(yaml.safe_dump(train))
    assert "global_batch_size" in refuse(config="train.yaml")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "Why?"}, "rows.jsonl:2"),
        ({"prompt": "Why?", "answer": ""}, "rows.jsonl:2"),
        ({"text": "Write f.", "test_list": ["assert g(1) =="]}, "rows.jsonl:2"),
        ([1], "rows.jsonl:2"),
    ],
)
def test_rows(row: object, complaint: str, files: Path, refuse: Refuse) -> None:
    (files / "rows.jsonl").write_text(f"{json.dumps(GOOD_ROW)}\n{json.dumps(row)}\n")
    line = refuse()
    assert complaint in line and "max_drop" in line


def test_a_file_that_is_held_out_leaves_no_prompt(refuse: Refuse) -> None:
    assert "contaminated" in refuse("--data.eval_files", "rows.jsonl")
