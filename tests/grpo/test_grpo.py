"""The command as a run: what it leaves, how it goes on, and what it makes of odd rewards."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_grpo import GROUP, NUM_PROMPTS, NUM_TASKS, REWARD, TinyGrpo, rollouts
from support.tiny_runs import differences, metrics, train_metrics

from jaxsft.cli import EXIT_FAILED, EXIT_STOPPED, parse_config
from jaxsft.export.__main__ import main as export
from jaxsft.generate.__main__ import main as generate
from jaxsft.grpo import collect, command
from jaxsft.grpo.__main__ import main
from jaxsft.run.preflight import TimedSteps

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_STEPS, BATCH = 6, NUM_PROMPTS * GROUP
KEYS = {
    *("loss", "grad_norm", "num_loss_tokens", "learning_rate", "applied", "reward", "right"),
    *("format", "completion_tokens", "reasoning_words", "entropy", "dead_groups", "truncated"),
    *("kl", "rollout_s", "reference_s", "reward_s", "update_s"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyGrpo:
    return TinyGrpo(tmp_path_factory.mktemp("grpo"))


def run(runs: TinyGrpo, name: str, *options: str) -> int:
    return main(["--config", str(runs.config), "--name", name, *options])


@pytest.fixture(scope="module")
def whole(runs: TinyGrpo) -> Path:
    assert run(runs, "whole") == 0
    return runs.path("whole")


def signalled(function: Callable[..., Any], nth: int) -> Callable[..., Any]:
    """The function, whose nth call begins with a SIGTERM to this process."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return call


def test_what_a_run_leaves(runs: TinyGrpo, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in metrics(whole) if "train/loss" in line]
    assert [line["step"] for line in lines] == [*range(1, NUM_STEPS + 1)]
    for line in lines:
        assert {f"train/{key}" for key in KEYS} | {f"train/reward_{runs.directory}/{REWARD}"} <= {
            *line
        }
        assert line["train/applied"] == 1 and line["train/right"] is None
    assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-9) and lines[-1]["train/kl"] > 1e-5
    drawn = rollouts(whole)
    assert [line["step"] for line in drawn] == [*np.repeat(range(1, NUM_STEPS + 1), BATCH)]
    assert len({line["text"] for line in drawn}) > len(drawn) / 2  # no two draws share noise
    assert {line["ended"] for line in drawn} == {"stop", "limit"}
    for step, metric in enumerate(lines, 1):
        of_step = [line for line in drawn if line["step"] == step]
        rewards = np.array([line["reward"] for line in of_step])
        assert [sum(c in "aeiou" for c in line["text"]) % 7 for line in of_step] == [*rewards]
        advantages = rewards - np.repeat(rewards.reshape(NUM_PROMPTS, GROUP).mean(1), GROUP)
        assert [line["advantage"] for line in of_step] == pytest.approx(advantages)
        assert metric["train/reward"] == pytest.approx(rewards.mean())
    result = json.loads((whole / "result.json").read_text())
    assert {"reward", "exact_format", "num_answers"} <= result["before"].keys()
    assert result["data"] == {"rows_read": 10, "prompts": 10, "heldout_prompts": 4}
    assert (whole / "adapter" / "adapter_model.safetensors").exists()
    samples = (whole / "samples.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in samples]
    assert steps == [0, 0, NUM_STEPS, NUM_STEPS]
    # config.yaml is a recipe, of the same run; a finished one says so and does nothing.
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    config = ("--config", str(whole / "config.yaml"))
    assert main([*config]) == 2  # the code that it names is another run's, until the user says so
    assert "whose code is not taken" in capsys.readouterr().err
    assert main([*config, *runs.rewarded_by("vowels")]) == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_is_a_model_of_other_commands(
    runs: TinyGrpo, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    length = ["--max_new_tokens", "4", "--batch_size", "2"]
    rows = [{"prompt": f"Say {NUM_TASKS + i} and more"} for i in range(2)]
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    capsys.readouterr()
    assert generate([str(whole), "--prompts", str(tmp_path / "asked.jsonl"), *length]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["text"] for each in answers] == [each["text"] for each in samples[-2:]]
    output = tmp_path / "out"
    assert export([str(whole), "--format", "peft", "--no-verify", "--output", str(output)]) == 0
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    card = (output / "README.md").read_text()
    assert f"{NUM_STEPS} steps on rollouts of {NUM_PROMPTS} prompts x {GROUP} completions" in card


def test_a_signal_in_a_rollout_loses_nothing(
    runs: TinyGrpo,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(collect, "roll_out", signalled(collect.roll_out, 4))
        assert run(runs, "stopped") == EXIT_STOPPED
    out = capsys.readouterr().out
    assert "step 3/6  reward " in out and "step 3 is saved" in out
    assert run(runs, "stopped") == 0
    assert "Continuing from step 3." in capsys.readouterr().out
    assert differences(runs.path("stopped"), whole) == []  # KL to the start among it


def test_updates_of_a_rollout_are_not_interrupted(
    runs: TinyGrpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--objective.num_iterations", "2", "--max_steps", "4", "--eval.num_prompts", "0")
    assert run(runs, "twice", *options) == 0
    lines, drawn = train_metrics(runs.path("twice")), rollouts(runs.path("twice"))
    assert [line["step"] for line in drawn] == [1] * BATCH + [3] * BATCH
    # At a rollout's first update every ratio is 1, and the run has not yet left its start.
    tokens = np.array([line["num_tokens"] * line["counted"] for line in drawn[:BATCH]])
    advantages = np.array([line["advantage"] for line in drawn[:BATCH]])
    expected = -(tokens @ advantages) / tokens.sum()
    assert lines[0]["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert lines[1]["train/loss"] < lines[0]["train/loss"]
    assert lines[1]["train/reward"] == lines[0]["train/reward"] != lines[2]["train/reward"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "train_step", signalled(command.train_step, 1))
        assert run(runs, "twice-stopped", *options) == EXIT_STOPPED
    assert len(train_metrics(runs.path("twice-stopped"))) == 2
    assert run(runs, "twice-stopped", *options) == 0
    assert differences(runs.path("twice-stopped"), runs.path("twice")) == []


def test_equal_rewards_teach_nothing_and_are_said(
    runs: TinyGrpo, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*runs.rewarded_by("constant"), "--max_steps", "20", "--save_steps", "20")
    assert run(runs, "constant", *options) == 0
    out = capsys.readouterr().out
    assert "no group had different rewards for 20 steps: nothing is learned" in out
    assert "nan" not in out
    lines = metrics(runs.path("constant"))[1:-1]
    assert all(line["train/dead_groups"] == 1 and line["train/kl"] is None for line in lines)
    assert_untouched(runs.path("constant"))


def test_completions_that_are_all_cut_off_teach_nothing(runs: TinyGrpo) -> None:
    endless = runs.directory / "endless"
    shutil.copytree(runs.directory / "model", endless)
    tensors = load_file(endless / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[np.linalg.norm(embedding, axis=1).argmax()] = 0
    save_file(tensors, endless / "model.safetensors")
    options = ("--objective.mask_truncated_completions", "true", "--max_steps", "2")
    assert run(runs, "endless", "--model.path", str(endless), *options) == 0
    assert {line["ended"] for line in rollouts(runs.path("endless"))} == {"limit"}
    assert_untouched(runs.path("endless"))


def assert_untouched(run_dir: Path) -> None:
    """Every B of the adapter is still zero."""
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_reward_that_fails_scores_0_and_the_step_goes_on(
    runs: TinyGrpo, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.directory / "rewards.py"
    weights = {f"{file}:{name}": 1.0 for name in ("vowels", "raises", "hangs", "is_nan")}
    options = ("--rewards", json.dumps(weights), "--reward.function_seconds", "0.5")
    assert run(runs, "failing", *options, "--max_steps", "2", "--eval.num_prompts", "0") == 0
    said = capsys.readouterr()
    for reason in ("RuntimeError: no idea", "took over 0.5 s", "nan"):
        assert reason in said.out + said.err
    for line in rollouts(runs.path("failing")):
        values = {name.split(":")[1]: reward["value"] for name, reward in line["rewards"].items()}
        assert values == {"vowels": line["reward"], "raises": 0, "hangs": 0, "is_nan": 0}
        reasons = {name.split(":")[1]: each["reason"] for name, each in line["rewards"].items()}
        assert "no idea" in reasons["raises"] and "0.5 s" in reasons["hangs"]
    assert [line["train/applied"] for line in train_metrics(runs.path("failing"))] == [1, 1]


def test_a_policy_beyond_measure_ends_the_run(
    runs: TinyGrpo, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--learning_rate", "1e30", "--eval.num_prompts", "0")
    assert run(runs, "beyond", *options) == EXIT_FAILED
    err = capsys.readouterr().err
    assert err.startswith("error: rollout 2: the model's log-probabilities are not finite")
    assert err.count("\n") == 1 and not (runs.path("beyond") / "adapter").exists()


def test_the_schedule_is_shortened_to_a_deadline(
    runs: TinyGrpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = command.time_rollouts

    def slow(*args: Any) -> Any:
        setup, _ = timed(*args)
        return setup, TimedSteps(100.0, [100.0, 100.0])

    monkeypatch.setattr(command, "time_rollouts", slow)
    limit = ("--fit-deadline", "--max-seconds", "900", "--max_steps", "1000000")
    assert run(runs, "fitted", *limit, "--eval.num_prompts", "0") == 0
    num_steps = json.loads((runs.path("fitted") / "schedule.json").read_text())["num_steps"]
    lines = train_metrics(runs.path("fitted"))
    assert 2 <= num_steps <= 8 and lines[-1]["step"] == len(lines) == num_steps
    assert lines[-1]["train/learning_rate"] < 0.5 * lines[0]["train/learning_rate"]


def test_a_fork_is_its_own_reference(runs: TinyGrpo, whole: Path) -> None:
    """Of a GRPO run, of a PEFT adapter, and of a run of `train`."""
    trained = runs.directory / "runs" / "trained"
    shutil.copytree(whole / "adapter", trained / "adapter")
    train = ["--config", str(runs.train_config), "--lora.r", "8", "--lora.alpha", "8"]
    (trained / "config.yaml").write_text(parse_config("jaxsft.train", "", train)[1])
    for number, source in enumerate((whole, whole / "adapter", trained)):
        options = ("--fork-from", str(source), "--max_steps", "2", "--eval.num_prompts", "0")
        assert run(runs, f"fork-{number}", *options) == 0
        lines = train_metrics(runs.path(f"fork-{number}"))
        assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-9) and lines[1]["train/kl"] > 0
    assert differences(runs.path("fork-1"), runs.path("fork-0")) == []
    assert differences(runs.path("fork-2"), runs.path("fork-0")) == []
    assert rollouts(runs.path("fork-0"))[0]["log_prob"] != rollouts(whole)[0]["log_prob"]


def test_the_fused_step_is_the_same_training(runs: TinyGrpo, whole: Path) -> None:
    assert run(runs, "fused", "--step", "fused", "--eval.num_prompts", "0") == 0
    assert_same_training(runs.path("fused"), whole)


@pytest.mark.slow
def test_two_devices_are_the_same_training(runs: TinyGrpo, whole: Path) -> None:
    options = ("--eval.num_prompts", "0")
    runs.finish("two", *options, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert_same_training(runs.path("two"), whole)


def assert_same_training(run_dir: Path, reference: Path) -> None:
    """The same completions and rewards, and within rounding the same numbers."""
    for ours, theirs in zip(rollouts(run_dir), rollouts(reference), strict=True):
        assert ours["log_prob"] == pytest.approx(theirs["log_prob"], abs=1e-3)
        close = {"log_prob": theirs["log_prob"]}
        assert ours | close == theirs
    for lines in zip(train_metrics(run_dir), train_metrics(reference), strict=True):
        ours, theirs = ({k: v for k, v in line.items() if v is not None} for line in lines)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
