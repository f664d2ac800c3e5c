"""Rows with tests and other rewards: what is asked, measured and written, and by whose code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_tokenizer import FakeTokenizer
from support.tiny_run import make_run

from jaxsft.config import DataOptions, GrpoConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.evaluate import command
from jaxsft.evaluate.__main__ import main
from jaxsft.evaluate.page import compare_page
from jaxsft.evaluate.rewarded import compare_passed
from jaxsft.evaluate.scoring import GeneratedAnswer
from jaxsft.evaluate.tasks import read_asked, score_answers
from jaxsft.rewards.sandbox import Sandbox
from jaxsft.rewards.scorer import Scorer

pytestmark = pytest.mark.usefixtures("quick_compilation")
FORM = AnswerTemplate()
TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]
FULL = {"text": "Write f.", "code": "def f(x): return x + 1", "test_list": TESTS, "task_id": 7}
FULL |= {"test_setup_code": "", "challenge_test_list": []}
SANITIZED = {"prompt": "Write f.", "code": "def f(x): return x + 1", "test_list": TESTS}
SANITIZED |= {"test_imports": [], "task_id": 8, "source_file": "mbpp.ipynb"}
OWN = {"prompt": "Write f.", "tests": TESTS}
SUM = {"question": "What is 2 + 3?", "answer": "2 + 3 is 5.\n#### 5"}
LONG = {"prompt": "Tell.", "response": "<think>So it was.</think>" + "Once upon a time. " * 20}
CODE = "```python\ndef f(x):\n    return x + 1\n```"
SHORT = ("--eval.max-new-tokens", "4", "--eval.batch-size", "4", "--max-length", "256")


def test_a_row_with_tests_is_asked_as_in_grpo(write: Callable[..., Path]) -> None:
    tokenizer, data = FakeTokenizer(), DataOptions(system_prompt="Think.")
    files = [write(FULL, SANITIZED, OWN, SUM, {"prompt": "hm"}, LONG, SUM)]
    asked = read_asked(files, tokenizer, data, 5)
    for prompt, task in zip(asked.prompts[:3], asked.tasks, strict=False):
        assert prompt.text == task.prompt and task.kind == "code"
        assert TESTS[0] in prompt.text and TESTS[1] not in prompt.text
        turns = [Turn("system", "Think."), Turn("user", prompt.text)]
        assert prompt.ids == encode_prompt(tokenizer, turns)
    # The solution in the form, of a row that train takes; else the tests.
    assert ["return" in each.reference for each in asked.prompts[:3]] == [True, False, False]
    assert asked.prompts[2].reference == "\n".join(TESTS)
    assert (asked.prompts[3].text, asked.tasks[3].answer) == ("What is 2 + 3?", "5")
    assert asked.prompts[4].text == "Tell." and asked.tasks[4].answer is None
    assert asked.has_samples
    assert asked.skipped.num_rejected == asked.form_only.num_rejected == 1
    assert not read_asked([write(OWN)], tokenizer, data, 5).has_samples


def answer(text: str, stopped: bool = True) -> GeneratedAnswer:
    return GeneratedAnswer("Write f.", "", text, 9, stopped, not stopped)


def test_tests_pass_in_the_format_and_outside(write: Callable[..., Path]) -> None:
    thought = "This adds one to what it is given."
    texts = [FORM.join(thought, CODE), CODE, FORM.join(thought, "def f(x): return 2"), "5"]
    answers = [*map(answer, texts), answer(FORM.join(thought, CODE), stopped=False)]
    asked = read_asked([write(OWN, FULL, SANITIZED, SUM, OWN)], FakeTokenizer(), DataOptions(), 5)
    with Scorer({"format": 0.2, "answer": 1.0, "tests": 1.0}, FORM) as scorer:
        found = score_answers(scorer, asked.tasks, answers)
    assert list(found.passed) == [True, True, False, None, True]
    assert [each.get("tests", each.get("answer")) for each in found.rewards][1].value == 0.0
    (line,) = compare_passed(found.passed, [False, True, False, None, True])
    assert (line.estimates[0].value, line.estimates[0].num) == (0.75, 4)
    assert line.estimates[0].low == pytest.approx(0.3006, abs=1e-4)  # Wilson's of 3 in 4
    assert line.difference is not None and line.difference.value == -0.25
    assert compare_passed([None]) == []
    page = compare_page("T", ["m"], [answers], compare_passed(found.passed), FORM, scored=[found])
    assert page.count("✓ tests") == 3 and page.count("✗ tests") == 1
    assert "tests 0: 0 of 2 hidden tests: wrong value" in page and 'value="right"' in page


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of grpo with a reward that is code in a file."""
    directory = tmp_path_factory.mktemp("runs")
    evil = directory / "evil.py"
    evil.write_text(
        f"open({str(directory / 'ran')!r}, 'w')\ndef f(texts, rows): return [1] * len(texts)"
    )
    options = {"rewards": f"{{format: 0.3, tests: 2, {evil}:f: 1}}", "model__dtype": "float32"}
    options |= {"model__param_dtype": "float32", "reward__min_reasoning_words": "3"}
    return make_run(directory / "run", tiny_model_dir, GrpoConfig, **options)


def evaluate(*arguments: object) -> dict[str, Any]:
    """evaluation.json of the command, which writes to its last argument."""
    assert main([*map(str, arguments), *SHORT]) == 0
    found: dict[str, Any] = json.loads((Path(str(arguments[-1])) / "evaluation.json").read_text())
    return found


def test_a_run_s_rewards_without_its_code(
    run_dir: Path, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, output = ("--files", write(OWN, OWN)), ("--output", tmp_path / "out")
    found = evaluate(run_dir, "--compare", "base", *files, *output)
    assert found["options"]["rewards"] == {"format": 0.3, "tests": 2.0}
    assert found["options"]["reward"]["min_reasoning_words"] == 3
    assert {"tests_passed", "reward", "reward_format", "right"} < found["metrics"].keys()
    assert "loss" not in found["metrics"] and "accuracy" not in found["metrics"]
    passed = found["metrics"]["tests_passed"]
    assert passed["models"][0]["value"] == 0.0 and passed["difference"]["p_value"] == 1.0
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    reward = line["rewards"][str(run_dir)]["format"]
    assert reward == {"value": 0.0, "reason": "not ended by the stop token"}
    assert line["tests_passed"][str(run_dir)] is False
    told = capsys.readouterr().err
    assert f"its reward {run_dir.parent}/evil.py:f is not measured" in told
    assert f"--rewards '{{format: 0.3, tests: 2, {run_dir.parent}/evil.py:f: 1}}'" in told
    assert not (run_dir.parent / "ran").exists()
    # Named here, it is run; an own reward needs no answer in a row.
    files = ("--files", write({"prompt": "Tell.", "kind": "poem"}, name="poem.jsonl"))
    rewards = ("--rewards", f"{run_dir.parent}/evil.py:f")
    found = evaluate(run_dir, *rewards, *files, *output)
    assert found["metrics"]["reward"]["models"][0]["value"] == 1.0
    assert (run_dir.parent / "ran").exists() and "not measured" not in capsys.readouterr().err


def test_numbers_have_the_metrics_that_they_had(
    tiny_model_dir: Path, run_dir: Path, write: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """… also where no sandbox can be had; rows with tests are then refused before any work."""

    def none(self: Sandbox) -> None:
        raise ValueError("rewards: programs can't be run safely on this machine")

    monkeypatch.setattr(Sandbox, "__enter__", none)
    output = ("--output", tmp_path / "out")
    found = evaluate(tiny_model_dir, "--files", write(SUM), *output)
    assert {"loss", "accuracy"} < found["metrics"].keys()
    assert not [name for name in found["metrics"] if name.startswith(("reward", "right", "tests"))]
    assert "rewards" not in (tmp_path / "out" / "answers.jsonl").read_text()
    monkeypatch.setattr(command, "measure_model", None)
    arguments = ["--files", write(SUM, FULL), *output]
    assert main([*map(str, [tiny_model_dir, *arguments]), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error == "error: rewards: programs can't be run safely on this machine\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rewards", "anser"), "there is no reward 'anser'; did you mean answer?"),
        (("--rewards", "none.py:f"), "rewards: none.py:f: there is no file"),
        (("--rewards", "{format: -1}"), "the weight of format must be at least 0"),
        (("--reward.code_seconds", "0"), "reward.code_seconds is 0"),
    ],
)
def test_bad_rewards_are_one_line(
    arguments: tuple[str, str],
    line: str,
    tiny_model_dir: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ("--files", str(write(SUM)), "--output", str(tmp_path / "out"))
    assert main([str(tiny_model_dir), *files, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and line in error
