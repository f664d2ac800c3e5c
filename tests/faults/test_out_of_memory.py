"""Memory that really runs out in the command as a user runs it: what it says, and that it helps."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# A process with JAX has 2 GiB of addresses for itself and 2.5 are left: the tiny model's step wants
# 3.6, half of it 1.8.
LIMIT_KIB = int(4.5 * 2**20)


@pytest.fixture
def train(
    tiny_model_dir: Path, tmp_path: Path, command_environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `train` on one step of 32 rows of 512 tokens, under `ulimit -v`."""
    rows = [{"prompt": f"Why {i}?", "response": "<think>So.</think>\nBecause."} for i in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {
        **{"--output_dir": tmp_path / "runs", "--model.path": tiny_model_dir, "--max_steps": 1},
        **{"--data.train_files": tmp_path / "rows.jsonl", "--data.eval_files": "[]"},
        **{"--data.max_length": 512, "--data.packing": "false", "--warmup_steps": 0},
        **{"--global_batch_size": 32, "--lora.r": 4, "--data.max_drop": 1},
    }
    command = [sys.executable, "-m", "jaxsft.train"]
    command += [str(part) for pair in options.items() for part in pair]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        limited = f"ulimit -v {LIMIT_KIB}; exec {shlex.join([*command, *more])}"
        return subprocess.run(
            ["bash", "-c", limited], env=command_environment, capture_output=True, text=True
        )

    return run


@pytest.mark.slow
def test_the_named_setting_is_one_that_fits(
    train: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    failed = train("--budget-hours", "9")
    assert failed.returncode == 1, failed.stderr
    announcement, line = failed.stderr.splitlines()
    assert announcement.startswith("out of memory: looking for the next smaller setting that fits")
    found = re.fullmatch(
        r"error: out of memory: needed (?P<needed>[\d.]+) GiB, available (?P<available>[\d.]+) "
        r"GiB; the next smaller setting that fits, by jaxsft.plan: (?P<options>"
        r"--gradient_accumulation_steps \d+ --model.remat \w+) \((?P<fits>[\d.]+) GiB\)",
        line,
    )
    assert found, line
    assert float(found["needed"]) > float(found["available"])
    assert float(found["needed"]) > float(found["fits"])
    helped = train(*found["options"].split())
    assert helped.returncode == 0, helped.stderr
