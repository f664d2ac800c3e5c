"""The benchmarks still run: their --help, and on request (slow) the smallest run of some."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.other_devices import COMPILE_FAST

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("glaive_like", "grpo_step", "gsm8k", "input_pipeline", "peers", "profile_step", "restart"),
    *("sampling", "sandbox", "step_time"),
)
# One process for all: most of the time is the import of JAX.
HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
"""


def test_every_benchmark_has_help() -> None:
    command = [sys.executable, "-c", HELP, *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().count("usage: ") == len(COMMANDS)


def test_the_sandbox_is_measured(tmp_path: Path) -> None:
    row = {"task_id": 1, "test_setup_code": "", "code": "def f(x):\r\n\treturn x"}
    row["test_list"] = ["assert f(1) == 1", "assert f(2) == 2"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = f"{tmp_path / 'rows.jsonl'} --first 1 --programs 3 --endless 1"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sandbox", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: this machine is busy
    assert "1 of 1 earn all" in done.stdout and "programs/s" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "input_pipeline --rows 200 --rounds 1 --no-peer",
        "profile_step TRACE --config CONFIG",
        "grpo_step --tiny --rounds 1",  # compares loss and gradient with TRL's
    ],
    ids=lambda command: command.partition(" ")[0],
)
def test_the_smallest_run(command: str, tmp_path: Path) -> None:
    model = {
        **{"model_type": "gemma2", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 2},
        **{"intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256},
        "sliding_window": 4096,
    }
    config = {
        "model": {"path": str(tmp_path)},
        "data": {"train_files": ["rows.jsonl"], "max_length": 256},
        **{"global_batch_size": 8, "max_steps": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    places = {"TRACE": str(tmp_path / "trace"), "CONFIG": str(tmp_path / "run.yaml")}
    name, *options = command.split()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *(places.get(o, o) for o in options)],
        cwd=ROOT,
        env=os.environ | COMPILE_FAST | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
