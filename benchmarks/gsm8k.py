"""What fine-tuning does, for real, on a laptop: the pretrained Gemma 3 270M on GSM8K.

`python -m benchmarks.gsm8k ROWS [--minutes 40] [--heldout 200]` trains on the rows of GSM8K's
training split but for the last ones (as many steps as fit in the minutes), measures the base model
and the tuned one on those, and draws the curve. Every command is printed as it is run.

Exit codes: 0 done; 1 a command failed; 2 bad input.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail

NUM_FOLLOWED = 32  # held-out rows whose loss is followed during training
SMOOTHED_STEPS = 20


def split_rows(rows: Path, num_heldout: int, directory: Path) -> dict[str, Path]:
    """Files of the rows to train on, to follow and to measure on; ValueError for too few rows."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) < 2 * num_heldout:
        raise ValueError(f"{rows}: {len(lines)} rows, {num_heldout} of them to be held out")
    parts = {"train": lines[:-num_heldout], "heldout": lines[-num_heldout:]}
    parts["followed"] = parts["heldout"][:NUM_FOLLOWED]
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.jsonl" for name in parts}
    for name, file in files.items():
        file.write_text("".join(parts[name]), encoding="utf-8")
    return files


def run(*arguments: str) -> None:
    """Runs a command of the package, which is printed."""
    command = ["python", "-m", *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command[1:]], check=True)


def plot(run_dir: Path, path: Path) -> None:
    """Training loss, smoothed, and held-out loss by step."""
    from matplotlib.figure import Figure

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    train = np.array([[x["step"], x["train/loss"]] for x in lines if "train/loss" in x]).T
    window = np.ones(min(SMOOTHED_STEPS, train.shape[1]))
    smooth = np.convolve(train[1], window / len(window), "valid")
    axes.plot(train[0], train[1], color="0.85", linewidth=0.8)
    axes.plot(train[0][len(window) - 1 :], smooth, label=f"training, mean of {len(window)} steps")
    for name, label in (("loss", "held out"), ("loss_answer", "held out, the answer alone")):
        points = [(x["step"], x[f"eval/{name}"]) for x in lines if f"eval/{name}" in x]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per completion token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gsm8k")
    parser.add_argument("rows", type=Path, help="GSM8K's training split as JSONL")
    parser.add_argument("--minutes", type=float, default=40.0, help="for training")
    parser.add_argument("--heldout", type=int, default=200, help="rows to measure on")
    parser.add_argument("--name", default="gsm8k", help="of the run, in runs/")
    parser.add_argument("--plot", type=Path, default=Path("gsm8k.png"), help="the curve")
    args = parser.parse_args(argv)
    run_dir = Path("runs") / args.name
    try:
        files = split_rows(args.rows, args.heldout, Path("runs") / f"{args.name}-rows")
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    try:
        run(
            *("jaxsft.train", "--config", "gsm8k", "--name", args.name),
            *("--data.train_files", str(files["train"])),
            *("--data.eval_files", str(files["followed"])),
            *("--max-seconds", f"{60 * args.minutes:g}", "--fit-deadline"),
        )
        plot(run_dir, args.plot)
        run(
            *("jaxsft.evaluate", "demo", "--compare", str(run_dir)),
            *("--files", str(files["heldout"]), "--max_length", "512"),
            *("--eval.num_prompts", str(args.heldout), "--eval.batch_size", "16"),
            *("--eval.max_new_tokens", "256", "--output", str(run_dir / "evaluation")),
        )
    except subprocess.CalledProcessError as error:
        return fail(f"exit code {error.returncode}", EXIT_FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
