"""One GRPO step of the real Gemma 3 270M on a CPU, beside TRL with PEFT.

`python -m benchmarks.grpo_step`: 8 prompts of data/grpo × 8 completions × 48 tokens (none stops
before) at temperature 1, the reference's log-probabilities, one update of AdamW. The same weights,
adapter, reference, prompts and rewards, in float32 on the same two cores: the package's own rollout
and step, and the methods of TRL's GRPOTrainer with transformers' `generate`. Loss and adapter
gradient of the same completions are compared first; then the two take turns.

Exit codes: 0 done; 1 slower than the goal, or they compute something else; 2 bad input.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks.peer_lab import ALPHA, NUM_THREADS, OURS, RANK, ROOT, TINY, export
from benchmarks.peer_protocol import Worker, WorkerError
from benchmarks.peers import gradient_differences
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail
from jaxsft.common.files import write_json
from jaxsft.config import RowFileOptions
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.grpo.prompts import read_prompts_of
from jaxsft.weights.load import demo_model_path

PROMPTS = ROOT / "data" / "grpo" / "largest.jsonl"
NUM_PROMPTS, GROUP_SIZE, NEW_TOKENS, ROW_LENGTH = 8, 8, 48, 256
TRL = "TRL + PEFT"
MODULES = {OURS: "peer_grpo_jaxsft", TRL: "peer_grpo_trl"}
PARTS = ("rollout", "reference", "update", "whole")
OBJECTIVE = {
    **{"loss_type": "dapo", "scale_rewards": "none", "epsilon": 0.2, "epsilon_high": 0.28},
    **{"beta": 0.02, "use_bias_correction_kl": True, "num_iterations": 1},
}
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3  # nats; relative, in the Frobenius norm
GOAL_RATIO = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    args = _parse(argv)
    num_rows = NUM_PROMPTS * GROUP_SIZE
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: must be at least 1")
        if args.micro_batches < 1 or num_rows % args.micro_batches:
            raise ValueError(f"--micro-batches {args.micro_batches}: must divide {num_rows}")
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            make_lab(directory, console, args.micro_batches, is_tiny=args.tiny)
            with contextlib.ExitStack() as stack:
                workers = {n: stack.enter_context(start(n, directory)) for n in MODULES}
                agreement = compare(workers, directory)
                console.print(
                    f"loss {agreement['loss'][OURS]:.7f}, {TRL} {agreement['loss'][TRL]:.7f}; "
                    f"gradient {agreement['whole']:.1e} apart, worst matrix "
                    f"{agreement['worst_matrix']:.1e}"
                )
                report = measure(workers, args.rounds)
        show(console, report)
        if args.json:
            write_json(args.json, {"agreement": agreement} | report)
    except WorkerError as error:
        return fail(error, EXIT_FAILED)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    if args.tiny:
        return 0  # such a step is overhead alone
    reached = report["ratios"]["whole"] >= GOAL_RATIO
    console.print(f"Goal, {GOAL_RATIO:g} × as fast: {'reached' if reached else 'NOT reached'}.")
    return 0 if reached else EXIT_FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo_step",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=1, help="timed steps of each side")
    parser.add_argument(
        "--micro-batches", type=int, default=4, help="parts of the update, on both sides"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a test of this")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def make_lab(directory: Path, console: Console, micro_batches: int, *, is_tiny: bool) -> None:
    """Writes model, adapter and the settings of both sides."""
    if is_tiny:
        num_ids = TINY["vocab_size"]
        rng = np.random.default_rng(0)
        prompts = [rng.integers(5, num_ids, 12 + i).tolist() for i in range(NUM_PROMPTS)]
    else:
        tokenizer = Tokenizer.from_gguf(demo_model_path())
        num_ids = tokenizer.vocab_size
        options = RowFileOptions(
            train_files=[str(PROMPTS)],
            eval_files=[],
            max_length=ROW_LENGTH,
            system_prompt=None,
        )
        read = read_prompts_of(
            options, tokenizer, console, rewards=("answer",), max_new_tokens=NEW_TOKENS
        )
        prompts = [each.ids for each in read.train[:NUM_PROMPTS]]
    settings = {
        "prompts": prompts,
        "num_ids": num_ids,
        "group_size": GROUP_SIZE,
        "new_tokens": NEW_TOKENS,
        "row_length": ROW_LENGTH,
        "micro_batches": micro_batches,
        "rewards": [i % GROUP_SIZE / GROUP_SIZE for i in range(NUM_PROMPTS * GROUP_SIZE)],
        "objective": OBJECTIVE,
        "reference_share": 0.5,  # of the policy's B: a reference that is apart from the policy
        "learning_rate": 1e-5,
    }
    write_json(directory / "settings.json", settings)
    # In a process of its own, so that this one holds no model while others are measured.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        places = directory / "model", directory / "adapter"
        pool.submit(export, *places, RANK, ALPHA, is_tiny=is_tiny).result()


@contextlib.contextmanager
def start(name: str, directory: Path) -> Iterator[Worker]:
    """A loaded side."""
    files = (directory / file for file in ("model", "adapter", "settings.json"))
    worker = Worker(
        name,
        [sys.executable, "-m", f"benchmarks.{MODULES[name]}", *map(str, files)],
        threads=NUM_THREADS,
        environment={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        log=directory / f"{MODULES[name]}.log",
    )
    try:
        worker.ask("load")
        yield worker
    finally:
        worker.close()


def compare(workers: Mapping[str, Worker], directory: Path) -> dict[str, Any]:
    """Losses and gradient differences on our completions; WorkerError unless they agree.

    Whatever compiles has run then.
    """
    losses, gradients = {}, {}
    for name, worker in workers.items():  # ours first: it draws
        out = directory / f"{MODULES[name]}.safetensors"
        given = {"out": str(out), "completions": str(directory / "completions.json")}
        losses[name] = worker.ask("gradients", **given)["loss"]
        gradients[name] = load_file(out)
        worker.ask("rest")
    found = gradient_differences(gradients[OURS], gradients[TRL])
    # Not `>`: a NaN must not pass.
    if not (abs(losses[TRL] - losses[OURS]) <= LOSS_BOUND and found["whole"] <= GRADIENT_BOUND):
        raise WorkerError(f"{TRL} computes something else: losses {losses}, gradients {found}")
    return {"loss": losses} | found


def measure(workers: Mapping[str, Worker], num_rounds: int) -> dict[str, Any]:
    """Seconds of each part by side, of steps in turns; TRL's medians over ours; peak memory."""
    seconds: dict[str, dict[str, list[float]]] = {n: {p: [] for p in PARTS} for n in workers}
    peaks = {}
    for _ in range(num_rounds):
        for name, worker in workers.items():
            reply = worker.ask("step")
            peaks[name] = reply["peak_rss_bytes"]
            for part in PARTS:
                seconds[name][part].append(reply[part])
            worker.ask("rest")
    medians = {
        name: {part: statistics.median(each) for part, each in parts.items()}
        for name, parts in seconds.items()
    }
    ratios = {part: medians[TRL][part] / medians[OURS][part] for part in PARTS}
    report = {"seconds": seconds, "medians": medians, "ratios": ratios}
    return report | {"peak_rss_bytes": peaks, "load": os.getloadavg()[0]}


def show(console: Console, report: Mapping[str, Any]) -> None:
    """The table of parts."""
    table = Table("part", f"{OURS}, s", f"{TRL}, s", "ratio", box=None, pad_edge=False)
    for part in PARTS:
        ours, theirs = (report["medians"][name][part] for name in (OURS, TRL))
        table.add_row(part, f"{ours:.2f}", f"{theirs:.2f}", f"{report['ratios'][part]:.2f} ×")
    console.print(table)
    ours, theirs = (report["peak_rss_bytes"][name] / 2**30 for name in (OURS, TRL))
    console.print(f"peak memory {ours:.1f} GiB, {TRL} {theirs:.1f} GiB; load {report['load']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
