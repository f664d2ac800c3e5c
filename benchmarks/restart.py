"""What saving and restarting cost: `python -m benchmarks.restart [--saves N]`.

With the real Gemma 3 270M, rank 64 on all seven projections, the demo's rows and save_steps:
- the stall: what one save in save_steps steps adds to the time of training: the wait of the loop
  for it, and what the steps beside it take longer than the median of the others.
- the restart: seconds from the start of the command to its first step, with an empty cache of
  compiled programs and with the one that the run before left.

Exit code 1 where the stall is 5% or more, or the second start is not faster than the first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from jaxsft.cli import parse_config
from jaxsft.config import TrainConfig
from jaxsft.data.samples import batches
from jaxsft.prepare.rows import load_data
from jaxsft.run.checkpoint_files import state_bytes
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.setup import build, check_early
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.find import open_tokenizer

ROOT = Path(__file__).parents[1]
UNMEASURED = ("--data.eval_files", "[]", "--eval_steps", "null")
MAX_STALL = 0.05
STEPS_BETWEEN = 6  # saves, while measuring


def main() -> int:
    """Runs both parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--saves", type=int, default=3)
    num_saves = parser.parse_args().saves
    config, _ = parse_config(
        "benchmarks.restart", "", ["--data.eval_files", "[]", "--eval_steps", "null"]
    )
    with tempfile.TemporaryDirectory() as directory:
        first_s, again_s = (time_to_first_step(Path(directory)) for _ in range(2))
        print(f"first step after {first_s:.1f} s, with the compile cache after {again_s:.1f} s")
        stall = measure_stall(config, Path(directory), num_saves)
    is_good = stall < MAX_STALL and again_s < first_s
    verdict = "good" if is_good else "NOT GOOD"
    print(
        f"with a save every {config.save_steps} steps training takes {stall:.1%} longer: {verdict}"
    )
    return 0 if is_good else 1


def time_to_first_step(directory: Path) -> float:
    """Seconds from the start of the command to the line of its first step; then it is stopped."""
    environment = os.environ | {"XDG_CACHE_HOME": str(directory / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    options = [
        "--output_dir",
        str(directory / "runs"),
        "--data.eval_files",
        "[]",
        "--eval_steps",
        "null",
    ]
    began_s = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "jaxsft.train", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step "):
                    return time.perf_counter() - began_s
        finally:
            process.kill()  # the run begins anew the next time
    raise SystemExit(f"the run ended with exit code {process.returncode} before its first step")


def measure_stall(config: TrainConfig, directory: Path, num_saves: int) -> float:
    """The share that saving adds to training time, each save once in `config.save_steps` steps."""
    jax.config.update("jax_default_matmul_precision", "highest")
    model = check_early(config)
    data = load_data(config.data, open_tokenizer(model.tokenizer))
    setup = build(config, data, model)
    state, frozen, spec = setup.state, setup.frozen, setup.spec
    metadata = {"fingerprint": setup.fingerprint}
    alone, beside, waits = [], [], []
    with Checkpoints(directory / "checkpoints", config.save_total_limit) as checkpoints:
        for index, batch in batches(setup.step_batches, 0, config.num_workers):
            is_saving = checkpoints.is_saving
            began_s = time.perf_counter()
            state, frozen, scalars = train_step(
                state, frozen, put_batch(batch, spec.model.mesh), spec=spec
            )
            jax.device_get(scalars)
            seconds = time.perf_counter() - began_s
            if index > 0:  # the first one compiles
                (beside if is_saving else alone).append(seconds)
            checkpoints.poll()
            if index % STEPS_BETWEEN == 0:
                if len(waits) == num_saves:
                    break
                began_s = time.perf_counter()
                checkpoints.save(int(state.step), state, metadata)
                waits.append(time.perf_counter() - began_s)
    step_s, wait_s = statistics.median(alone), statistics.mean(waits)
    slower_s = (sum(beside) - len(beside) * step_s) / num_saves
    mib, num_beside = state_bytes(state) / 2**20, len(beside) / num_saves
    print(
        f"{num_saves} saves of {mib:.0f} MiB, steps of {step_s:.2f} s: the loop waits {wait_s:.2f} "
        f"s for one, the {num_beside:.1f} steps beside it take {slower_s:+.2f} s longer"
    )
    return (wait_s + slower_s) / (config.save_steps * step_s)


if __name__ == "__main__":
    sys.exit(main())
