"""The command as a user runs it, in processes of its own, on a tiny Gemma 3 with real tokens."""

import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.child import Child
from support.samples import load_samples

from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, parse_config
from jaxsft.common.batch import batch_hash
from jaxsft.config import DataOptions, TrainConfig
from jaxsft.data.packing import Sample
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.prepare.rows import Data
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.run import Run
from jaxsft.run.setup import Setup, abstract_state
from jaxsft.step.optimizer import make_schedule
from jaxsft.train.__main__ import main
from jaxsft.train.command import train
from jaxsft.weights.find import find_base
from jaxsft.weights.load import load_model
from jaxsft.weights.peft import load_adapter

NUM_STEPS = 24
FACTS = {
    "Name a red fruit.": "Apple",
    "What is two plus three?": "Five",
    "Which animal barks?": "A dog",
    "What is the opposite of cold?": "Hot",
    "How many legs has a spider?": "Eight",
    "What melts in the sun?": "Ice",
    "Which ocean is the largest?": "The Pacific",
    "Which month follows May?": "June",
    "What do bees make?": "Honey",
    "Who wrote Hamlet?": "Shakespeare",
    "Which metal is liquid?": "Mercury",
    "Where do penguins live?": "In the south",
}
NUM_TRAIN = 8
METRICS = {
    "applied", "grad_norm", "learning_rate", "loss", "num_loss_tokens", "tokens_per_s",
    "model_flops_per_s", "batch_hash",
}  # fmt: skip
SPEEDS = ("train/tokens_per_s", "train/model_flops_per_s")


class Runs:
    """Runs of one config, `directory`/config.yaml, in `directory`/runs."""

    def __init__(self, directory: Path, model: Path, environment: dict[str, str]) -> None:
        self.directory, self.model, self.environment = directory, model, environment
        rows = [
            {"prompt": question, "response": f"<think>I recall: {fact}.</think>\n{fact}."}
            for question, fact in FACTS.items()
        ]
        for name, part in (("train", rows[:NUM_TRAIN]), ("heldout", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (directory / f"{name}.jsonl").write_text(lines)
        config = {
            "output_dir": str(directory / "runs"),
            "model": {"path": str(model)},
            "lora": {"r": 4, "alpha": 8},
            "data": {
                "train_files": [str(directory / "train.jsonl")],
                "eval_files": [str(directory / "heldout.jsonl")],
                "max_length": 160,
            },
            "eval": {"num_prompts": 2, "batch_size": 4, "max_new_tokens": 4},
            "global_batch_size": 4,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_steps": 4,
            "loss_chunk_tokens": 256,
        }
        self.config = directory / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def path(self, name: str) -> Path:
        return self.directory / "runs" / name

    def argv(self, name: str, *options: str) -> list[str]:
        return ["--config", str(self.config), "--name", name, *options]

    def start(self, name: str, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jaxsft.train", *self.argv(name, *options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.environment,
        )

    def run(self, name: str, *options: str) -> str:
        """Runs to the end, which must be a good one without a word on stderr; returns stdout."""
        process = self.start(name, *options)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), out + err
        return out

    def interrupt(
        self, name: str, after: str, number: signal.Signals, *options: str
    ) -> tuple[int, str, str]:
        """Sends a signal when a line starts with `after`: (exit code, stdout, stderr)."""
        command = [sys.executable, "-m", "jaxsft.train", *self.argv(name, *options)]
        with Child(command, self.environment, self.directory / name) as child:
            child.wait_for(after)
            child.send(number)
            return child.wait(), child.out, child.err

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.path(name) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def train_metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of steps, without what depends on the clock."""
        lines = [line for line in self.metrics(name) if "train/loss" in line]
        return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.path(name) / "result.json").read_text())

    def adapter_bytes(self, name: str) -> dict[str, bytes]:
        directory = self.path(name) / "adapter"
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> (time of the last change, contents) of every file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: Path,
    command_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    return Runs(tmp_path_factory.mktemp("train"), tiny_model_dir, command_environment)


@pytest.fixture(scope="module")
def finished(runs: Runs) -> tuple[Runs, str]:
    """(runs, what the run "whole" wrote to stdout); it was never interrupted."""
    return runs, runs.run("whole")


def refuse(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    """The one line on stderr with which main refuses."""
    capsys.readouterr()
    assert main(argv) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_run_s_state_needs_no_known_name(tiny_model_dir: Path) -> None:
    """A hub's name need not be a preset's: what its files say counts."""
    config = parse_config("jaxsft.train", "", ["--model.path", "someone/finetune"])[0]
    state = abstract_state(config, find_base(str(tiny_model_dir)))
    assert len(jax.tree.leaves(state.adapter)) > 0


@pytest.mark.quick
def test_a_run_leaves_everything(finished: tuple[Runs, str]) -> None:
    runs, out = finished
    run_dir = runs.path("whole")
    assert {path.name for path in run_dir.iterdir()} == {
        "adapter",
        "before.json",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "samples.jsonl",
        "tensorboard",
    }
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"20", "24"}
    (events,) = (run_dir / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"sample/0" in events.read_bytes()
    result = runs.result("whole")
    assert {"jaxsft", "python", "jax", "jaxlib", "flax", "optax"} < result["versions"].keys()
    assert result["hardware"] == {"device": "cpu", "devices": 1, "hosts": 1}
    assert (result["run_time"]["from_step"], result["run_time"]["to_step"]) == (0, NUM_STEPS)
    assert result["run_time"]["seconds"] > 0 and "jaxsft.train" in result["command"]
    assert f"step {NUM_STEPS}/{NUM_STEPS}  loss " in out
    assert "held-out loss" in out and str(run_dir / "adapter") in out.replace("\n", "")
    assert set(runs.adapter_bytes("whole")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_loop_takes_its_batches_from_any_source(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []

    def train_backwards(config: TrainConfig, data: Data, run: Run, setup: Setup) -> Setup:
        made = [setup.step_batches[step] for step in (2, 1, 0)]
        hashes.extend(batch_hash(batch) for batch in made)
        return train(run, setup, batches=enumerate(made), rows_of=lambda step: [f"mine: {step}"])

    monkeypatch.setattr("jaxsft.train.command.train_on_rows", train_backwards)
    assert main(runs.argv("any-source", "--max_steps", "3")) == 0
    lines = (runs.path("any-source") / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "train/loss" in line]
    assert [line["train/batch_hash"] for line in steps] == hashes
    assert len(set(hashes)) == 3


def test_config_yaml_reloads_to_the_same(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    kept = runs.path("whole") / "config.yaml"
    again = parse_config("jaxsft.train", "", ["--config", str(kept)])[0]
    assert again == parse_config("jaxsft.train", "", runs.argv("whole"))[0]


@pytest.mark.quick
def test_metrics_have_one_line_a_step(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    lines = runs.metrics("whole")
    assert [line["step"] for line in lines] == [0, *range(1, NUM_STEPS + 1), NUM_STEPS]
    steps = lines[1:-1]
    for line in steps:
        assert line.keys() == {"step"} | {f"train/{name}" for name in METRICS}
        assert line["train/applied"] == 1 and line["train/grad_norm"] > 0
    # Speed is null until there are two steps to measure between.
    assert [line["train/tokens_per_s"] is None for line in steps[:2]] == [True, False]
    rates = [line["train/learning_rate"] for line in steps]
    schedule = make_schedule("cosine", peak=1e-2, end=1e-3, warmup_steps=2, num_steps=NUM_STEPS)
    assert rates == pytest.approx([float(schedule(step)) for step in range(NUM_STEPS)])
    # Batches of 4 of the 8 rows: two steps see all of them.
    counts = [line["train/num_loss_tokens"] for line in steps]
    assert len({counts[i] + counts[i + 1] for i in range(0, NUM_STEPS, 2)}) == 1


@pytest.mark.quick
def test_the_loss_goes_down(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    losses = [line["train/loss"] for line in runs.train_metrics("whole")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    result = runs.result("whole")
    assert result["after"]["loss"] < 0.9 * result["before"]["loss"]
    lines = runs.metrics("whole")
    assert lines[0]["eval/loss"] == result["before"]["loss"]
    assert lines[-1]["eval/loss"] == result["after"]["loss"]


def test_answers_before_and_after_are_kept(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    lines = (runs.path("whole") / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    questions = list(FACTS)[NUM_TRAIN : NUM_TRAIN + 2]
    assert [answer["prompt"] for answer in answers] == [*questions, *questions]
    assert [answer["step"] for answer in answers] == [0, 0, NUM_STEPS, NUM_STEPS]
    for answer, question in zip(answers, [*questions, *questions], strict=True):
        assert answer["reference"].endswith(f"<answer>{FACTS[question]}.</answer>")
    for before, after in zip(answers[:2], answers[2:], strict=True):
        assert before["text"] and before["text"] != after["text"]
    for when, step in (("before", 0), ("after", NUM_STEPS)):
        found = runs.result("whole")[when]
        assert found["num_answers"] == 2
        assert [{"step": step, **each} for each in found["answers"]] == [
            answer for answer in answers if answer["step"] == step
        ]


@pytest.mark.quick
def test_a_finished_run_is_left_alone(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    before = snapshot(runs.path("whole"))
    out = runs.run("whole")
    assert "whole is finished" in out and str(runs.path("whole") / "adapter") in out
    assert "held-out loss" in out and "step " not in out and "other options" not in out
    assert snapshot(runs.path("whole")) == before


def test_a_finished_run_says_which_options_changed(
    finished: tuple[Runs, str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, _ = finished
    before = snapshot(runs.path("whole"))
    assert main(runs.argv("whole", "--seed", "7")) == 0
    out = capsys.readouterr().out
    assert "It was made with other options than now: seed: 7." in out
    # Not only that it is finished, but how to go on.
    assert f"--fork-from {runs.path('whole')} --name whole-2. To train anew: another --name" in out
    assert snapshot(runs.path("whole")) == before


@jax.jit
def our_logits(state: nnx.State, tokens_BT: jax.Array, graphdef: nnx.GraphDef) -> jax.Array:
    model = nnx.merge(graphdef, state)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))


def test_peft_loads_the_adapter(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    tokenizer = Tokenizer.from_file(runs.model / "tokenizer.model")
    adapter = runs.path("whole") / "adapter"
    model = load_model(runs.model, dtype="float32", param_dtype="float32")[0]
    load_adapter(adapter, model)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        runs.model, dtype=torch.float32, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property that it has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        peft_model = peft.PeftModel.from_pretrained(hf_model, adapter).eval()

    samples, _ = load_samples(
        runs.directory / "heldout.jsonl", tokenizer, DataOptions(max_length=160, overlong="raise")
    )
    graphdef, state = nnx.split(model)
    loss_sum, num_tokens = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            theirs = peft_model(torch.tensor(sample.ids, dtype=torch.long)[None]).logits
        if sample is samples[0]:
            ours = np.asarray(our_logits(state, jnp.asarray(sample.ids)[None], graphdef))
            assert np.abs(ours - theirs.numpy()).max() <= 1e-4
        loss, count = completion_loss(theirs[0], sample)
        loss_sum, num_tokens = loss_sum + loss, num_tokens + count
    # And these are the weights that the run had measured.
    assert loss_sum / num_tokens == pytest.approx(runs.result("whole")["after"]["loss"], rel=1e-5)


def completion_loss(logits_TV: torch.Tensor, sample: Sample) -> tuple[float, int]:
    """(summed loss of the completion tokens in nats, their number)."""
    labels = torch.tensor(sample.ids[1:], dtype=torch.long)
    losses = torch.nn.functional.cross_entropy(logits_TV[:-1], labels, reduction="none")
    is_label = torch.tensor(sample.loss_mask[1:])
    return losses[is_label].sum().item(), int(is_label.sum())


def test_stopped_and_killed_runs_go_on_bit_for_bit(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    # Generation changes nothing in training.
    options = ("--eval.num_prompts", "0")
    code, out, err = runs.interrupt("cut", "step 5/", signal.SIGTERM, *options)
    assert (code, err) == (EXIT_STOPPED, "Stopping soon; once more to stop at once.\n")
    assert EXIT_STOPPED == 75
    assert out.splitlines()[-1].startswith("To go on, run the same command again: python -m ")
    stopped_at = len(runs.train_metrics("cut"))
    assert 5 <= stopped_at < NUM_STEPS - 6
    assert not (runs.path("cut") / "result.json").exists()

    code, out, err = runs.interrupt("cut", f"step {stopped_at + 5}/", signal.SIGKILL, *options)
    assert (code, err) == (-signal.SIGKILL, "")
    assert f"Continuing from step {stopped_at}." in out and "Measuring" not in out
    whole_steps = Checkpoints(runs.path("cut") / "checkpoints", 2).steps()
    assert stopped_at <= whole_steps[-1] < NUM_STEPS

    out = runs.run("cut", *options)
    assert f"Continuing from step {whole_steps[-1]}." in out and "warning" not in out
    # Each step is there once, with the very numbers of the run that nothing happened to.
    assert runs.train_metrics("cut") == runs.train_metrics("whole")
    assert runs.result("cut")["after"]["loss"] == runs.result("whole")["after"]["loss"]
    assert runs.adapter_bytes("cut") == runs.adapter_bytes("whole")
    assert {path.name for path in (runs.path("cut") / "checkpoints").iterdir()} == {"20", "24"}


@pytest.mark.parametrize(
    ("options", "there", "here"),
    [
        (["--lora.r", "2"], "lora.r is 4 there", "2 here"),
        (["--seed", "7"], "seed is 42 there", "7 here"),
        (["--data.start", "1"], "data is ", " here"),
        (["--learning_rate", "0.1"], "learning_rate is 0.01 there", "0.1 here"),
        (["--max_steps", "25"], "max_steps is 24 there", "25 here"),
    ],
    ids=["rank", "seed", "data", "learning rate", "steps"],
)
def test_a_changed_run_is_not_continued(
    options: list[str],
    there: str,
    here: str,
    finished: tuple[Runs, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, _ = finished
    if not runs.path("unfinished").exists():
        shutil.copytree(runs.path("whole"), runs.path("unfinished"))
        (runs.path("unfinished") / "result.json").unlink()
    before = snapshot(runs.path("unfinished"))
    line = refuse(capsys, runs.argv("unfinished", *options))
    assert "this checkpoint is of another run" in line and there in line and here in line
    assert snapshot(runs.path("unfinished")) == before


def test_an_adapter_is_trained_further(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    # The first batch is all held-out rows, so its loss is the one that "whole" ended with.
    heldout = str(runs.directory / "heldout.jsonl")
    options = ("--fork_from", str(runs.path("whole") / "adapter"), "--eval.num_prompts", "0")
    same_rows = ("--data.train_files", heldout, "--data.drop_contaminated", "false")
    runs.run("further", *options, *same_rows)
    after = runs.result("whole")["after"]["loss"]
    assert runs.result("further")["before"]["loss"] == after
    losses = [line["train/loss"] for line in runs.train_metrics("further")]
    assert losses[0] == pytest.approx(after, rel=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--lora.r", "2", "lora.r is 4 there and 2 here"),
        ("--lora.alpha", "4", "lora.alpha is 8.0 there and 4.0 here"),
        (
            "--lora.target_modules",
            "q_proj",
            "lora.target_modules is all-linear there and q_proj here",
        ),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    option: str,
    value: str,
    complaint: str,
    finished: tuple[Runs, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, _ = finished
    adapter = str(runs.path("whole") / "adapter")
    line = refuse(capsys, runs.argv("other", "--fork_from", adapter, option, value))
    assert complaint in line and adapter in line
    assert not runs.path("other").exists()


def test_packing_and_accumulation_change_no_loss(runs: Runs) -> None:
    # Every step sees the same four rows: one a row, or two a row in two micro-batches.
    common = ("--data.stop", "4", "--data.eval_files", "[]", "--max_steps", "4")
    runs.run("unpacked", *common)
    packed = ("--data.packing", "true", "--data.max_length", "320", "--global_batch_size", "2")
    out = runs.run("packed", *common, *packed, "--gradient_accumulation_steps", "2")
    assert "train: 2 rows of 320 tokens" in out
    pairs = zip(runs.train_metrics("packed"), runs.train_metrics("unpacked"), strict=True)
    # Adam makes differences of rounding grow from step to step.
    for ours, expected in pairs:
        assert ours["train/num_loss_tokens"] == expected["train/num_loss_tokens"]
        assert ours["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)
    # Without held-out rows there is nothing to measure, and nothing is.
    result = runs.result("packed")
    assert (result["before"], result["after"]) == ({}, {})
    assert "Measuring" not in out and "before" not in out


def test_a_run_that_is_not_finite_fails_in_one_line(finished: tuple[Runs, str]) -> None:
    runs, _ = finished
    huge = runs.directory / "huge"
    shutil.copytree(runs.path("whole") / "adapter", huge)
    weights = load_file(huge / "adapter_model.safetensors")
    huge_weights = {name: 1e30 * value for name, value in weights.items()}
    save_file(huge_weights, huge / "adapter_model.safetensors")
    process = runs.start("huge", "--fork_from", str(huge), "--data.eval_files", "[]")
    out, err = process.communicate()
    assert process.returncode == EXIT_FAILED, out + err
    steps = "error: loss or gradient not finite in steps 1 to 3; no such update was applied. "
    assert err.startswith(f"{steps}Their rows: ") and err.count("\n") == 1
    # With the rows of each, and in a file for all.
    skipped = [
        json.loads(x) for x in (runs.path("huge") / "skipped.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in skipped] == [1, 2, 3]
    assert {line["reason"] for line in skipped} == {"not finite"}
    train_file = runs.directory / "train.jsonl"
    every_row = {f"{train_file}:row {number}" for number in range(1, NUM_TRAIN + 1)}
    assert {*skipped[0]["rows"], *skipped[1]["rows"]} == every_row
    assert err.count(str(train_file)) == 8 and err.endswith("and 4 more (all in skipped.jsonl)\n")
    # The steps are there to be looked at, and nothing claims to be a result.
    assert [line["train/applied"] for line in runs.train_metrics("huge")] == [0, 0, 0]
    assert not (runs.path("huge") / "adapter").exists()
    assert not (runs.path("huge") / "result.json").exists()
