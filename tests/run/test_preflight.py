"""--preflight and multi-host start-up: what stops a run, what it says, and that it changes none."""

import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.experimental import pallas as pl
from support.twins import make_twin
from support.two_tasks import two_tasks

import jaxsft.run.agreement
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, parse_config
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.prepare.rows import load_data
from jaxsft.run.agreement import StepDifference, compare_ways
from jaxsft.run.setup import build, check_early
from jaxsft.step import fused_layer
from jaxsft.step.train_step import put_batch
from jaxsft.train.__main__ import main
from jaxsft.weights.find import open_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Completions of 40 to 180 tokens beside windows of 8: spelt in bytes, mostly.
ROWS = [
    {"prompt": f"What is {n}?", "response": f"<think>{'I count. ' * n}</think>\nIt is {n}."}
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 of a local and a global layer, soft caps and windows of 8 tokens."""
    tokenizer = tiny_model_dir / "tokenizer.model"
    directory = tmp_path_factory.mktemp("models") / "tiny-gemma2"
    hf_model, _ = make_twin(
        "gemma2",
        vocab_size=Tokenizer.from_file(tokenizer).vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=512,
    )
    hf_model.save_pretrained(directory)
    shutil.copy(tokenizer, directory)
    return directory


@pytest.fixture
def argv(model_dir: Path, tmp_path: Path) -> list[str]:
    """The command's arguments for three steps of the model."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows)
    config = {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(model_dir)},
        "lora": {"r": 4, "alpha": 8},
        "data": {
            "train_files": [str(tmp_path / "rows.jsonl")],
            "max_length": 256,
            "system_prompt": None,
        },
        "global_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "loss_chunk_tokens": 128,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "config.yaml")]


def found_by_preflight(tmp_path: Path, name: str = "run") -> dict[str, Any]:
    return json.loads((tmp_path / "runs" / name / "preflight.json").read_text())


def test_preflight_measures_and_stops(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--preflight", "--budget_hours", "9"]) == 0
    out, err = capsys.readouterr()
    assert not err
    found = found_by_preflight(tmp_path)
    assert found["problems"] == [] and found["not_compared"] == ""
    assert found["difference"]["ways"] == "plain and fused step"
    assert 0 < found["difference"]["gradient"] < 1e-4 and found["difference"]["loss"] < 1e-5
    times = sorted(found["timed_seconds"])
    assert len(times) == 20 and found["seconds_per_step"] == (times[9] + times[10]) / 2
    assert found["hours"] == 3 * found["seconds_per_step"] / 3600
    assert "plain and fused step agree" in out and "budget_hours 9" in out
    assert f"train step: plain, program {found['program_hash']}" in out
    assert f"  program  {found['program_hash']}" in out
    # Nothing was trained, and the run can still be made.
    assert {path.name for path in (tmp_path / "runs" / "run").iterdir()} == {
        "config.yaml",
        "preflight.json",
    }


@pytest.mark.parametrize("step", ["plain", "fused"])
def test_a_preflight_changes_no_bit_of_the_run(
    argv: list[str], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*argv, "--step", step, "--name", "without"]) == 0
    assert not (tmp_path / "runs" / "without" / "preflight.json").exists()
    monkeypatch.setattr(
        "jaxsft.train.command.is_on_tpu", lambda setup: True
    )  # there every run has one
    assert main([*argv, "--step", step, "--name", "with"]) == 0
    assert found_by_preflight(tmp_path, "with")["num_steps_left"] == 3
    kept = []
    for name in ("without", "with"):
        run_dir = tmp_path / "runs" / name
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        losses = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
        kept.append((losses, (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert len(kept[0][0]) == 3
    assert kept[0] == kept[1]


def test_a_run_over_its_budget_stops(
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxsft.train.command.is_on_tpu", lambda setup: True)
    # With dropout there is only one way to compute the step, and it is timed all the same.
    options = ("--budget_hours", "1e-9", "--lora.dropout", "0.5")
    assert main([*argv, *options]) == EXIT_FAILED == 1
    out, err = capsys.readouterr()
    assert "not compared: step fused does not go with lora.dropout 0.5" in out
    assert err.startswith("error: 3 steps at ") and err.count("\n") == 1
    assert "hours, budget_hours is 1e-09; take fewer steps" in err
    assert len(found_by_preflight(tmp_path)["problems"]) == 1
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_signal_stops_the_preflight(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxsft.run.session.catch_signals", lambda: nullcontext(lambda: True))
    assert main([*argv, "--preflight"]) == EXIT_STOPPED
    assert capsys.readouterr().out.splitlines()[-1].startswith("To go on, run the same")


def test_ways_that_disagree_stop_the_run(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = jaxsft.run.agreement.fuse

    def fuse_wrongly(frozen: Any, layout: Any) -> Any:
        weights = fuse(frozen, layout)
        return weights | {"final_norm": weights["final_norm"] * 1.001}

    monkeypatch.setattr(jaxsft.run.agreement, "fuse", fuse_wrongly)
    assert main([*argv, "--preflight"]) == EXIT_FAILED
    out, err = capsys.readouterr()
    assert "plain and fused step DISAGREE" in out
    assert err.startswith("error: plain and fused step disagree on this machine: loss by ")
    assert err.count("\n") == 1


def test_kernels_are_compared_with_xla(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a TPU, but with the kernels interpreted; values 1% off are found."""
    pallas_call = pl.pallas_call
    monkeypatch.setattr(
        pl, "pallas_call", lambda *args, **kw: pallas_call(*args, **kw | {"interpret": True})
    )
    config, _ = parse_config("jaxsft.train", "", [*argv, "--step", "fused"])
    path = check_early(config)
    data = load_data(config.data, open_tokenizer(path.tokenizer))
    setup = build(config, data, path)
    assert setup.spec.model.fused is not None
    with_kernels = setup.spec.model.fused._replace(use_kernel=True)
    model = dataclasses.replace(setup.spec.model, fused=with_kernels)
    setup = dataclasses.replace(setup, spec=dataclasses.replace(setup.spec, model=model))
    # A fresh B is zero, and with it the gradient of A, whatever the kernels do.
    adapter = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), setup.state.adapter)
    batch = put_batch(setup.step_batches[0], setup.spec.model.mesh)

    def difference() -> StepDifference:
        jax.clear_caches()
        _, found, not_compared = compare_ways(config, setup, adapter, batch)
        assert found is not None and not not_compared
        assert found.ways == "Pallas kernels and XLA"
        return found

    right = difference()
    assert right.is_small and right.gradient > 0

    forward = fused_layer.attention_forward

    def forward_wrongly(*args: Any, **kw: Any) -> jax.Array:
        return 1.01 * forward(*args, **kw)

    monkeypatch.setattr(fused_layer, "attention_forward", forward_wrongly)
    assert not difference().is_small


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--preflight=maybe"], "preflight"),
        (["--budget_hours", "0"], "budget_hours is 0.0, but must be above 0, or null"),
        (["--budget_hours", "soon"], "budget_hours"),
        (["--multihost", "maybe"], "multihost"),
        (["--multihost", "true"], "multihost: no other processes to join"),
    ],
)
def test_bad_options(
    options: list[str],
    complaint: str,
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*argv, *options]) == EXIT_BAD_INPUT == 2
    err = capsys.readouterr().err
    assert complaint in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def run_two_processes(
    argv: list[str], environment: dict[str, str], *options: str
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of both processes of a two-process run, started as Slurm does."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxsft.train", *argv, "--multihost", "true", *options],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in two_tasks()
    ]
    outputs = [process.communicate() for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.mark.slow
def test_preflight_in_two_processes(
    argv: list[str], command_environment: dict[str, str], tmp_path: Path
) -> None:
    first, second = run_two_processes(argv, command_environment, "--preflight")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "3 steps of 2 rows on 2 cpu devices" in first[1]
    assert "Preflight" in first[1] and "Preflight" not in second[1]  # one of them speaks
    assert found_by_preflight(tmp_path)["difference"]["gradient"] < 1e-4
