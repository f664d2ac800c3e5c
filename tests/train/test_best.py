"""The adapter of the lowest held-out loss, wherever the run is stopped and whatever is damaged."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_runs import TinyRuns, differences

from jaxsft.cli import EXIT_STOPPED
from jaxsft.run.metrics import last_step_of
from jaxsft.run.run import Run
from jaxsft.train.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The loss has its minimum on the way: eight rows, far too high a learning rate.
OPTIONS = (
    *("--learning_rate", "20", "--lr_scheduler_type", "constant", "--data.stop", "8"),
    *("--max_steps", "30", "--eval_steps", "5", "--save_total_limit", "1"),
    *("--eval.num_prompts", "2"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("best"))


def run(runs: TinyRuns, name: str, *options: str) -> int:
    return main(["--config", str(runs.config), "--name", name, *OPTIONS, *options])


@pytest.fixture(scope="module")
def whole(runs: TinyRuns) -> Path:
    assert run(runs, "whole") == 0
    return runs.path("whole")


def test_a_stop_at_the_best_step_does_not_lose_it(
    runs: TinyRuns, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (best,) = {path.name for path in (whole / "checkpoints").iterdir()} - {"30"}
    assert (whole / "adapter-best").is_dir() and 0 < int(best) < 30
    lines = (whole / "samples.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [step for step in range(0, 31, 5) for _ in range(2)]  # both prompts, each time
    stopped = runs.path("stopped")
    with monkeypatch.context() as patch:
        # As a signal in that step: before its evaluation.
        interrupted = lambda: last_step_of(stopped) >= int(best)  # noqa: E731
        patch.setattr("jaxsft.run.session.catch_signals", lambda: nullcontext(interrupted))
        assert run(runs, "stopped") == EXIT_STOPPED
    assert (stopped / "checkpoints" / best).is_dir()
    assert run(runs, "stopped") == 0
    assert differences(stopped, whole) == []


def test_measuring_is_no_slow_step(runs: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise as much time would be kept free before the session's end."""
    passed_s, sessions = [0.0], []
    measure = Run.measure

    def slow_measure(self: Run, setup: Any) -> dict[str, Any]:
        found = measure(self, setup)
        sessions.append(self.session)
        return found

    def slow(*_: Any, **__: Any) -> dict[str, float]:
        passed_s[0] += 1e6
        return {"loss": 1.0}

    times = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + passed_s[0])
    monkeypatch.setattr(Run, "measure", slow_measure)
    monkeypatch.setattr("jaxsft.train.command.measure_rows", slow)
    for module in ("run.run", "run.session"):
        monkeypatch.setattr(f"jaxsft.{module}.time", times)
    assert run(runs, "measured", "--max_steps", "12") == 0
    assert len(sessions) == 4 and 0 < sessions[-1].p99_step_s < 1e6 <= sessions[-1].measure_s


def test_a_damaged_best_step_is_left_out_and_said(
    runs: TinyRuns, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (best,) = {path.name for path in (whole / "checkpoints").iterdir()} - {"30"}
    (whole / "result.json").unlink()
    for path in (whole / "checkpoints" / best).rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(reversed(path.read_bytes())))
    assert run(runs, "whole") == 0
    out = capsys.readouterr().out
    assert "WARNING: the best step is damaged, adapter-best is left out" in out
    assert (whole / "checkpoints" / best).is_dir()


def test_a_run_without_its_checkpoints_is_not_begun_again(
    runs: TinyRuns, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "result.json").unlink(missing_ok=True)
    (whole / "checkpoints").rename(whole.parent / "elsewhere")
    assert run(runs, "whole") == 2
    assert "it had reached step 30, but there is no checkpoint" in capsys.readouterr().err
