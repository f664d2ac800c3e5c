"""One LoRA step of the real Gemma 3 270M on a CPU, beside other trainers.

`python -m benchmarks.peers`: the same weights, adapter, rows and AdamW, in float32 on the same two
cores, for jaxsft, transformers + PEFT (torch) and Tunix + qwix (JAX). Losses and adapter gradients
are compared first; then the trainers take turns, so that a machine that slows down slows all of
them down. The peers live in virtual environments that the first call makes: 3.4 GB with the CPU
build of torch, where pip is configured to find one.

Exit codes: 0 measured; 1 a peer failed or computes something else; 2 bad input.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks import peer_venvs
from benchmarks.peer_lab import ALLOCATORS, OURS, PEERS, ROOT, Lab, make_row_sets
from benchmarks.peer_protocol import WorkerError
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail
from jaxsft.common.batch import Batch
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.weights.load import demo_model_path

LOSS_BOUND = 1e-4  # nats
# Relative, in the Frobenius norm: the gradient as a whole, and any one adapter matrix. They are
# this wide because torch's float32 log_softmax over 262,144 words is off by 7e-5, which moves its
# gradient by 5e-4 and single matrices by 1.4e-3; Tunix is within 1e-5 and 1e-4.
GRADIENT_BOUND, MATRIX_BOUND = 1e-3, 1e-2
GOAL_RATIO = 1.5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    try:
        args = _parse(argv)
        row_sets = make_row_sets(args.data, Tokenizer.from_gguf(demo_model_path()))
        pythons = {OURS: Path(sys.executable)}
        for name, module in PEERS.items():
            console.print(f"Environment of {name} …")
            pythons[name] = peer_venvs.ensure(module, peer_venvs.REQUIREMENTS[module], args.venvs)
        with tempfile.TemporaryDirectory(dir=args.venvs) as directory:
            lab = Lab(Path(directory), pythons, args.data, row_sets)
            console.print("Comparing losses and gradients …")
            report: dict[str, Any] = {"agreement": compare(lab)}
            show_agreement(console, report["agreement"], row_sets)
            allocators = list(ALLOCATORS) if args.allocator == "both" else [args.allocator]
            for allocator in allocators:
                console.print(f"Timing {args.rounds} rounds, allocator: {allocator} …")
                report[allocator] = measure(lab, allocator, args.rounds)
                show_figures(console, report[allocator])
    except WorkerError as error:
        return fail(error, EXIT_FAILED)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    reached = all(goal_reached(report[allocator]) for allocator in allocators)
    console.print(
        f"Goal, {GOAL_RATIO} x both with less memory than both: "
        f"{'reached' if reached else 'not reached'}."
    )
    report["goal"] = {"ratio": GOAL_RATIO, "reached": reached}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ValueError in one line."""
    parser = _Parser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data" / "sample" / "train.jsonl",
        help="JSONL or Parquet rows, in any form that jaxsft.train reads",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each trainer")
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    parser.add_argument(
        "--venvs", type=Path, default=peer_venvs.DEFAULT_DIR, help="where the environments live"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: must be at least 1")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such directory")
    if sys.platform != "linux":
        raise ValueError(f"this benchmark needs Linux with glibc, not {sys.platform}")
    return args


def compare(lab: Lab) -> dict[str, Any]:
    """Losses and gradients of every trainer on every row set; WorkerError unless they agree.

    Returns, by row set: `loss` by trainer (nats per loss token) and, by peer, what
    `gradient_differences` returns.
    """
    losses: dict[str, dict[str, float]] = {rows: {} for rows in lab.files}
    for name in lab.pythons:
        with lab.start(name, "default") as worker:
            for rows, path in lab.files.items():
                out = lab.directory / f"{name}-{rows}.safetensors"
                reply = worker.ask("gradients", rows=str(path), out=str(out))
                losses[rows][name] = reply["loss"]
    report: dict[str, Any] = {}
    for rows, loss in losses.items():
        ours = load_file(lab.directory / f"{OURS}-{rows}.safetensors")
        report[rows] = {"loss": loss}
        for name in PEERS:
            theirs = load_file(lab.directory / f"{name}-{rows}.safetensors")
            report[rows][name] = differences = gradient_differences(ours, theirs)
            # Not `>`: a NaN must not pass.
            if not (
                abs(loss[name] - loss[OURS]) <= LOSS_BOUND
                and differences["whole"] <= GRADIENT_BOUND
                and differences["worst_matrix"] <= MATRIX_BOUND
            ):
                raise WorkerError(
                    f"{name} computes something else on {rows} rows: loss {loss[name]:.6f}, ours "
                    f"{loss[OURS]:.6f}; gradients differ by {differences['whole']:.1e}, the worst "
                    f"matrix by {differences['worst_matrix']:.1e}"
                )
    return report


def gradient_differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """|ours - theirs| / |theirs| in Frobenius norms: `whole`, and `worst_matrix` of the adapter.

    Where they have a fused `kv_proj`, its A has the sum of K's and V's gradients, and the rows of
    its B are K's and then V's.
    """
    ours = dict(ours)
    for key in theirs:
        if "kv_proj" in key:
            pair = [ours.pop(key.replace("kv_proj", name)) for name in ("k_proj", "v_proj")]
            ours[key] = pair[0] + pair[1] if "lora_A" in key else np.concatenate(pair)
    if ours.keys() != theirs.keys():
        raise WorkerError(f"adapter matrices differ: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    differences = np.array([np.linalg.norm(ours[key] - theirs[key]) for key in theirs])
    norms = np.array([np.linalg.norm(theirs[key]) for key in theirs])
    return {
        "whole": float(np.linalg.norm(differences) / np.linalg.norm(norms)),
        "worst_matrix": float((differences / norms).max()),
    }


def measure(lab: Lab, allocator: str, rounds: int) -> dict[str, Any]:
    """Timed steps in turns, by trainer: peak RSS in bytes, and by row set the steps' seconds,
    tokens per second and, for peers, the median of their time over ours."""
    with contextlib.ExitStack() as stack:
        workers = {n: stack.enter_context(lab.start(n, allocator)) for n in lab.pythons}
        seconds: dict[str, dict[str, list[float]]] = {
            n: {r: [] for r in lab.files} for n in workers
        }
        peak_rss_bytes = {}
        for turn in range(rounds + 1):  # the first compiles
            for rows, path in lab.files.items():
                for name, worker in workers.items():
                    # Of two steps the second counts: the first gets back the memory and the
                    # caches that went to the others.
                    count = 2 if turn else 1
                    reply = worker.ask("steps", rows=str(path), count=count)
                    peak_rss_bytes[name] = reply["peak_rss_bytes"]
                    if turn:
                        seconds[name][rows].append(reply["seconds"][-1])
                    worker.ask("rest")
    report: dict[str, Any] = {}
    for name in workers:
        report[name] = {"peak_rss_bytes": peak_rss_bytes[name]}
        for rows, batch in lab.row_sets.items():
            report[name][rows] = figures(seconds[name][rows], seconds[OURS][rows], batch)
    return report


def figures(seconds: list[float], our_seconds: list[float], batch: Batch) -> dict[str, Any]:
    """One trainer's figures on a batch, from its steps and ours of the same rounds."""
    median = statistics.median(seconds)
    pairs = zip(seconds, our_seconds, strict=True)
    return {
        "step_s": median,
        "all_steps_s": seconds,
        "loss_tokens_per_s": int(batch.loss_weights_BT.sum()) / median,
        "real_tokens_per_s": int((batch.segment_ids_BT > 0).sum()) / median,
        "times_ours": statistics.median(theirs / ours for theirs, ours in pairs),
    }


def goal_reached(report: dict[str, Any]) -> bool:
    """Whether every peer takes 1.5 x our time on all rows, and more memory."""
    return all(
        report[name]["peak_rss_bytes"] > report[OURS]["peak_rss_bytes"]
        and all(report[name][rows]["times_ours"] >= GOAL_RATIO for rows in ("padded", "full"))
        for name in PEERS
    )


def show_agreement(
    console: Console, agreement: dict[str, Any], row_sets: Mapping[str, Batch]
) -> None:
    """A line for each row set, and one for each trainer on it."""
    for rows, report in agreement.items():
        batch = row_sets[rows]
        num_tokens, num_loss_tokens = (batch.segment_ids_BT > 0).sum(), batch.loss_weights_BT.sum()
        console.print(
            f"{rows} rows: {' x '.join(map(str, batch.tokens_BT.shape))}, {num_tokens} tokens, "
            f"{num_loss_tokens} with loss"
        )
        for name, loss in report["loss"].items():
            line = f"  {name}: loss {loss:.6f}"
            if name != OURS:
                found = report[name]
                line += (
                    f", gradient {found['whole']:.1e} from ours, worst matrix "
                    f"{found['worst_matrix']:.1e}"
                )
            console.print(line)


def show_figures(console: Console, report: dict[str, Any]) -> None:
    """The table of one allocator setting."""
    table = Table(box=None, pad_edge=False)
    table.add_column("trainer", no_wrap=True)
    for title in ("rows", "s/step", "loss tokens/s", "real tokens/s", "x ours", "peak GiB"):
        table.add_column(title, justify="right")
    for name, of_trainer in report.items():
        for rows in ("padded", "full"):
            row = of_trainer[rows]
            numbers = (row["step_s"], row["loss_tokens_per_s"], row["real_tokens_per_s"])
            gib = of_trainer["peak_rss_bytes"] / 2**30
            cells = [*(f"{x:.1f}" for x in numbers), f"{row['times_ours']:.2f}", f"{gib:.1f}"]
            table.add_row(name, rows, *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
