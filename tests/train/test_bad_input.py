"""Mistakes of the user: exit code 2, one line that says what and where, no traceback, no debris."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from jaxsft.cli import EXIT_BAD_INPUT
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.train.__main__ import main

GOOD_ROW = {"prompt": "Why?", "response": "<think>It has to be so.</think>\nBecause."}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 241000000\n"

Refuse = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def shared_tokenizers() -> Iterator[None]:
    """Parses each tokenizer once."""
    with pytest.MonkeyPatch.context() as patch:
        from_file = functools.cache(Tokenizer.from_file)
        patch.setattr(Tokenizer, "from_file", from_file)
        yield


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A directory with all that a run needs: config.yaml and rows.jsonl."""
    rows = [GOOD_ROW | {"prompt": f"Why is it {number}?"} for number in range(4)]
    write_rows(tmp_path, *map(json.dumps, rows))
    config = {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir)},
        "data": {"train_files": [str(tmp_path / "rows.jsonl")], "max_length": 160},
        "lora": {"r": 2},
        "global_batch_size": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def refuse(files: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    def refuse(*options: str) -> str:
        """The line with which the command refuses; it must have left nothing behind."""
        before = sorted(files.rglob("*"))
        code = main(["--config", str(files / "config.yaml"), *options])
        err = capsys.readouterr().err
        assert code == EXIT_BAD_INPUT == 2
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        assert sorted(files.rglob("*")) == before
        return err

    return refuse


def write_rows(directory: Path, *lines: str) -> None:
    (directory / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--lerning_rate", "1e-3"], "unknown option 'lerning_rate'; did you mean --learning_rate"),
        (["--lora_r", "8"], "unknown option 'lora_r'; did you mean --lora.r?"),
        (["--learning_rate", "-1e-3"], "learning_rate is -0.001, but must be above 0"),
        (["--learning_rate", "high"], "learning_rate.*high"),
        (["--gradient_accumulation_steps", "4"], "global_batch_size 2 is not a multiple of .* 4"),
        (["--config", "singel_session"], "no such file or recipe; did you mean 'single_session'"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml: no such file or recipe"),
        (["--model.remat", "some"], "model.remat.*'none', 'projections', 'full'.*some"),
        (["--lora.dropout", "1.5"], "lora.dropout is 1.5"),
        (["train.jsonl"], "unexpected argument 'train.jsonl'"),
        (["--name", "../x"], "name is '../x'"),
    ],
)
def test_options(options: list[str], complaint: str, refuse: Refuse) -> None:
    assert re.search(complaint, refuse(*options))


@pytest.mark.parametrize("text", ["a: [1,\nb: }", "- 1\n- 2", "", "\x00", "just text"])
def test_config_files_that_are_none(text: str, files: Path, refuse: Refuse) -> None:
    (files / "broken.yaml").write_text(text)
    assert re.search("(?i)config", refuse("--config", str(files / "broken.yaml")))


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"prompt": "Why?", "resp'], "rows.jsonl:2: broken or cut off at column 20"),
        # One odd row is counted; here it is half of them.
        (["[1, 2]"], r"rows.jsonl:2 \(is a list"),
        (['{"prompt": "Why?"}'], r"rows.jsonl:2 \(no prompt with a response"),
        (
            ['{"prompt": "a", "prompt": "b", "response": "c"}'],
            r'rows.jsonl:2 \("prompt" is there',
        ),
        (
            ['{"messages": [{"role": "user", "content": "a"}]}'],
            r"rows.jsonl:2 \(the roles are user",
        ),
    ],
)
def test_broken_rows_are_named_by_line(
    lines: list[str], complaint: str, files: Path, refuse: Refuse
) -> None:
    write_rows(files, json.dumps(GOOD_ROW), *lines)
    assert re.search(complaint, refuse())


def test_data_files(files: Path, refuse: Refuse) -> None:
    assert "missing.jsonl: cannot be read" in refuse(
        "--data.train_files", str(files / "missing.jsonl")
    )
    (files / "none").mkdir()
    assert "is a directory without" in refuse("--data.train_files", str(files / "none"))
    assert "missing.jsonl: cannot be read" in refuse(
        "--data.eval_files", str(files / "missing.jsonl")
    )
    assert "no rows in the range 9:" in refuse("--data.start", "9")
    write_rows(files, json.dumps(GOOD_ROW | {"response": "No thought."}))
    line = refuse()
    assert "no sample is left" in line and "1 too_short, as" in line
    write_rows(files)
    assert "rows.jsonl: is empty" in refuse()


def test_rows_that_are_too_long(files: Path, refuse: Refuse) -> None:
    long_row = GOOD_ROW | {"prompt": "Why? " * 100}
    write_rows(files, json.dumps(GOOD_ROW), json.dumps(long_row))
    line = refuse("--data.overlong", "raise")
    assert re.search(r"rows.jsonl:2 \(\d+ tokens, limit 160\): too long", line)


def test_schedule_and_lengths(refuse: Refuse) -> None:
    # Four rows of one sample, batches of two: two steps.
    assert "warmup_steps 2 is not below the run's 2 steps" in refuse("--warmup_steps", "2")
    line = refuse("--warmup_steps", "3", "--max_steps", "3")
    assert "warmup_steps 3 is not below max_steps 3" in line
    line = refuse("--data.max_length", "1024")
    assert "data.max_length 1024 is beyond the model's 512 positions" in line


def test_lora_options(files: Path, refuse: Refuse) -> None:
    line = refuse("--lora.target_modules", "q_proj,w_proj")
    assert "'w_proj' is not a linear layer of Gemma; did you mean" in line and "q_proj" in line
    line = refuse("--fork_from", str(files / "no_adapter"))
    assert str(files / "no_adapter") in line


@pytest.fixture
def model(files: Path, tiny_model_dir: Path) -> Path:
    """A model directory of links to the tiny model's files, to be spoilt."""
    directory = files / "model"
    directory.mkdir()
    for path in tiny_model_dir.iterdir():
        (directory / path.name).symlink_to(path)
    return directory


def replace(path: Path, text: str | None) -> None:
    path.unlink()
    if text is not None:
        path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("model.safetensors", LFS_POINTER, "model.safetensors.*Git LFS pointer"),
        ("model.safetensors", "", "model.safetensors"),
        ("model.safetensors", None, "safetensors"),
        ("tokenizer.model", LFS_POINTER, "tokenizer.model: a Git LFS pointer"),
        ("tokenizer.model", None, "has no tokenizer.json and no tokenizer.model; name one"),
        ("config.json", "{", "config.json"),
        ("config.json", None, "config.json"),
        ("config.json", '{"model_type": "llama"}', "llama"),
    ],
)
def test_model_files(
    name: str, text: str | None, complaint: str, model: Path, refuse: Refuse
) -> None:
    replace(model / name, text)
    assert re.search(complaint, refuse("--model.path", str(model)))


def test_model_paths(
    files: Path, tiny_model_dir: Path, tokenizer: Tokenizer, refuse: Refuse
) -> None:
    missing = str(files / "missing")
    assert missing in refuse("--model.path", missing)
    pointer = files / "pointer.gguf"
    pointer.write_text(LFS_POINTER)
    assert re.search("pointer.gguf.*Git LFS pointer", refuse("--model.path", str(pointer)))
    # A tokenizer given on its own does not hide the model's absence.
    good = str(tiny_model_dir / "tokenizer.model")
    line = refuse("--model.path", missing, "--model.tokenizer", good)
    assert missing in line and "no such file or directory" in line
    # Another Gemma's tokenizer has other ids for the same text.
    other = files / "other.model"
    other.write_bytes(tokenizer.model_bytes)
    line = refuse("--model.tokenizer", str(other))
    assert "the tokenizer has 262144 ids, the model's embedding" in line


def test_output_directories_that_cannot_be_made(files: Path, refuse: Refuse) -> None:
    (files / "a_file").write_text("here")
    for path in (files / "a_file", files / "a_file" / "deeper", Path("/proc/no_such_place")):
        assert str(path) in refuse("--output_dir", str(path))
    assert (files / "a_file").read_text() == "here"
    # The run directory itself is taken by a file.
    (files / "runs").mkdir()
    (files / "runs" / "run").write_text("here")
    assert str(files / "runs" / "run") in refuse()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--lora_r", "8"], "did you mean --lora.r?"),
        (["--data.train_files", "broken.jsonl"], "broken.jsonl:2: broken or cut off at column 2"),
        (["--warmup_steps", "9"], "warmup_steps 9 is not below the run's 2 steps"),
    ],
)
def test_as_a_process(
    options: list[str], complaint: str, files: Path, command_environment: dict[str, str]
) -> None:
    (files / "broken.jsonl").write_text(json.dumps(GOOD_ROW) + "\n{\n")
    result = subprocess.run(
        [sys.executable, "-m", "jaxsft.train", "--config", "config.yaml", *options],
        cwd=files,
        env=command_environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert complaint in result.stderr
    assert not (files / "runs").exists()


def test_a_demo_option_at_fault_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    # Without --config it is the demo that is refused, before anything is read.
    assert main(["--lora.r", "0"]) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert not out and err == "error: lora.r is 0, but must be above 0\n"
