"""The path from rows to the train step, measured on rows like Glaive's.

`python -m benchmarks.input_pipeline` generates them (1.3 GB of text; kept for the next call) and
measures, on two cores: `jaxsft.prepare` at three sizes, its time and memory; how full the packed
rows are, beside the most that any packing could reach; batches from prepared rows on one core,
beside tokenising and padding on the fly; and TRL's preparation of the same rows (tokenise and
pack), in turns with ours. TRL lives in a virtual environment that the first call makes: 1.5 GB with
the CPU build of torch, where pip is configured to find one.

Exit codes: 0 measured; 1 a command failed, or TRL makes other tokens; 2 bad input.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import glaive_like, peer_venvs
from benchmarks.input_feeding import feed_naive, feed_prepared
from benchmarks.input_peers import prepare_with_trl, write_trl_rows
from benchmarks.process_tree import ROOT, CommandError, Usage, run_measured
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail
from jaxsft.common.files import cache_dir, write_json
from jaxsft.data.prepared import Prepared, open_prepared
from jaxsft.data.sources import ROWS_MANIFEST
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.weights.load import demo_model_path

RECIPE = "single_session_packed"
SEED, DEFECT_RATE = 0, 0.002  # malformed rows are rare in the original
SIZES = (20_000, 60_000)  # measured on the way to all rows
ROW_LENGTHS = (2048, 4096, 8192)
ROW_LENGTH, BATCH_SIZE = 4096, 16  # the recipe's
NAIVE_ROW_LENGTH, NAIVE_BATCH_SIZE = 2048, 32  # without packing: single_session's
NUM_CORES = 2
FEED_SECONDS = 10.0
STEP_TOKENS_PER_S = 80_000  # 65,536 in a step of 0.8 s
GOAL_MINUTES, GOAL_GIB, GOAL_FEED, GOAL_FILL_4096 = 8.0, 4.0, 100.0, 0.93
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    # Logs have room, whatever the terminal has.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    args = _parse(argv)
    try:
        if args.rows < 1 or args.peer_rows < 1 or args.rounds < 1:
            raise ValueError("--rows, --peer-rows and --rounds must be at least 1")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no such directory")
        args.work.mkdir(parents=True, exist_ok=True)
        files = make_set(args.work, args.rows, console)
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            report = measure(files, args, Path(scratch), console)
        if args.json:
            write_json(args.json, report)
    except CommandError as error:
        return fail(error, EXIT_FAILED)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=180_000, help="rows of the set")
    parser.add_argument("--peer-rows", type=int, default=5_000, help="of them prepared by TRL")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and TRL's")
    parser.add_argument(
        "--full", action="store_true", help="TRL prepares all rows, once; takes an hour"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave TRL out")
    parser.add_argument(
        "--work", type=Path, default=cache_dir("input_pipeline"), help="where the rows are kept"
    )
    parser.add_argument(
        "--venvs", type=Path, default=peer_venvs.DEFAULT_DIR, help="where TRL's environment lives"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def make_set(work: Path, num_rows: int, console: Console) -> list[Path]:
    """The files of the generated set, made unless this code has made them before."""
    code = hashlib.sha256(Path(glaive_like.__file__).read_bytes()).hexdigest()[:8]
    directory = work / f"glaive-like-{num_rows}-{code}"
    if not directory.is_dir():
        console.print(f"Generating {num_rows:,} rows …")
        with tempfile.TemporaryDirectory(dir=work) as partial:
            made = Path(partial) / "set"
            glaive_like.write_glaive_like(made, num_rows, SEED, defect_rate=DEFECT_RATE)
            made.rename(directory)
    return sorted(directory.glob("*.parquet"))


def measure(
    files: Sequence[Path], args: argparse.Namespace, scratch: Path, console: Console
) -> dict[str, Any]:
    """Everything, shown as it comes; the figures by part."""
    sizes = sorted({size for size in SIZES if size < args.rows} | {args.rows})
    console.print(f"Preparing {', '.join(f'{size:,}' for size in sizes)} rows …")
    fill: list[dict[str, Any]] = []
    by_size = []
    for size in sizes:
        usage, prepared = run_prepare(files, size, ROW_LENGTH, scratch)
        by_size.append(prepare_figures(usage, prepared))
        if size == sizes[0]:
            fill.append(fill_figures(prepared))
        if size != sizes[-1]:
            shutil.rmtree(prepared.directory)
    report: dict[str, Any] = {"prepare": by_size}
    show_prepare(console, by_size)

    tokenizer = Tokenizer.from_gguf(demo_model_path())
    rates = {
        "prepared rows": feed_prepared(prepared.rows, BATCH_SIZE, FEED_SECONDS),
        "tokenised and padded on the fly": feed_naive(
            files, tokenizer, NAIVE_ROW_LENGTH, NAIVE_BATCH_SIZE, FEED_SECONDS
        ),
    }
    report["feed"] = {name: rate._asdict() for name, rate in rates.items()}
    show_feed(console, report["feed"])
    shutil.rmtree(prepared.directory)

    for row_length in ROW_LENGTHS:
        if row_length != ROW_LENGTH:
            _, prepared = run_prepare(files, sizes[0], row_length, scratch)
            fill.append(fill_figures(prepared))
            shutil.rmtree(prepared.directory)
    report["fill"] = sorted(fill, key=lambda each: each["row_length"])
    show_fill(console, report["fill"])
    if not args.no_peer:
        report["trl"] = compare_with_trl(files, tokenizer, args, scratch, console)
        show_trl(console, report["trl"])
    return report


def run_prepare(
    files: Sequence[Path], num_rows: int, row_length: int, scratch: Path
) -> tuple[Usage, Prepared]:
    """The command on the first rows, in a directory of its own, and what it made."""
    root = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "jaxsft.prepare", "--config", RECIPE, "--model.path", "demo"]
    command += ["--data.train_files", json.dumps([str(file) for file in files])]
    command += ["--data.eval_files", "[]", "--eval_steps", "null", "--data.stop", str(num_rows)]
    command += ["--data.max_length", str(row_length), "--data.prepared_dir", str(root)]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    usage = run_measured(
        command, num_cores=NUM_CORES, environment=environment, log=scratch / "prepare.log"
    )
    [manifest] = root.glob(f"*/{ROWS_MANIFEST}")
    return usage, open_prepared(manifest.parent)


def prepare_figures(usage: Usage, prepared: Prepared) -> dict[str, Any]:
    """One size's."""
    return {
        "rows": prepared.report.rows_read,
        "samples": prepared.report.samples,
        "tokens": prepared.rows.num_tokens,
        "seconds": usage.seconds,
        "cpu_s": usage.cpu_s,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_anonymous_bytes": usage.peak_anonymous_bytes,
        "rejected": dict(prepared.report.rejected),
    }


def fill_figures(prepared: Prepared) -> dict[str, Any]:
    """One row length's; `bound` is the fill with the fewest rows that any packing could need."""
    rows, manifest = prepared.rows, prepared.manifest
    return {
        "row_length": rows.row_length,
        "fill": rows.fill,
        "bound": rows.fill * len(rows) / manifest["fewest_rows"],
        "samples": prepared.report.samples,
        "shortened": prepared.report.shortened,
    }


def compare_with_trl(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    scratch: Path,
    console: Console,
) -> dict[str, Any]:
    """Both in turns on the same rows: seconds of each, rows/s, and the median ratio.

    Ours is the whole command, theirs only what SFTTrainer does to the rows: they are given ours
    converted, and their interpreter and imports are not counted.
    """
    num_rows, rounds = (
        (args.rows, 1) if args.full else (min(args.peer_rows, args.rows), args.rounds)
    )
    console.print("Environment of TRL …")
    python = peer_venvs.ensure("trl", peer_venvs.REQUIREMENTS["trl"], args.venvs)
    console.print(f"Preparing {num_rows:,} rows, ours and TRL's in turns …")
    rows_file, first_ids = write_trl_rows(files, num_rows, tokenizer, scratch)
    ours, theirs = [], []
    for _ in range(rounds):
        usage, prepared = run_prepare(files, num_rows, ROW_LENGTH, scratch)
        ours.append(prepare_figures(usage, prepared) | {"fill": prepared.rows.fill})
        shutil.rmtree(prepared.directory)
        theirs.append(
            prepare_with_trl(python, rows_file, scratch, ROW_LENGTH, NUM_CORES, first_ids)
        )
    pairs = zip(ours, theirs, strict=True)
    return {
        "rows": num_rows,
        "ours": ours,
        "theirs": theirs,
        "times_ours": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
    }


def show_prepare(console: Console, by_size: Sequence[dict[str, Any]]) -> None:
    """Time and memory by size."""
    titles = ("tokens", "s", "CPU s", "rows/s", "tokens/s", "peak GiB", "anonymous")
    table = _table("jaxsft.prepare, rows", *titles)
    for size in by_size:
        cells = [f"{size['tokens']:,}", f"{size['seconds']:.1f}", f"{size['cpu_s']:.1f}"]
        cells += [f"{size[name] / size['seconds']:,.0f}" for name in ("rows", "tokens")]
        cells += [f"{size[f'peak_{kind}_bytes'] / GIB:.2f}" for kind in ("rss", "anonymous")]
        table.add_row(f"{size['rows']:,}", *cells)
    console.print(table)
    last = by_size[-1]
    minutes, gib = last["seconds"] / 60, last["peak_rss_bytes"] / GIB
    console.print(
        f"Goal at 180,000 rows, {GOAL_MINUTES:.0f} minutes on {NUM_CORES} cores and {GOAL_GIB:.0f} "
        f"GiB; {last['rows']:,} rows took {minutes:.1f} minutes and {gib:.2f} GiB, "
        f"{last['peak_rss_bytes'] / by_size[0]['peak_rss_bytes']:.2f} x those of the fewest rows."
    )


def show_feed(console: Console, rates: dict[str, dict[str, Any]]) -> None:
    """Tokens a second, and how often the step's."""
    table = _table("on one core", "steps", "positions/s", "tokens/s", "x the step's 80K/s")
    for name, rate in rates.items():
        numbers = [f"{rate[key]:,.0f}" for key in ("num_steps", "positions_per_s", "tokens_per_s")]
        table.add_row(name, *numbers, f"{rate['positions_per_s'] / STEP_TOKENS_PER_S:,.1f}")
    console.print(table)
    prepared, naive = rates.values()
    ratio = prepared["tokens_per_s"] / naive["tokens_per_s"]
    console.print(f"Goal {GOAL_FEED:.0f} x; {ratio:,.0f} x the naive path, padding not counted.")


def show_fill(console: Console, lengths: Sequence[dict[str, Any]]) -> None:
    """How full the rows are, and could be."""
    table = _table("row length", "fill", "bound", "samples", "shortened")
    for each in lengths:
        shares = [f"{each[name]:.2%}" for name in ("fill", "bound")]
        counts = [f"{each[name]:,}" for name in ("samples", "shortened")]
        table.add_row(str(each["row_length"]), *shares, *counts)
    console.print(table)
    console.print(f"Goal {GOAL_FILL_4096:.0%} at 4096, within 1% of the bound at 2048 and 8192.")


def show_trl(console: Console, found: dict[str, Any]) -> None:
    """The two preparations side by side."""
    table = _table("preparation", "s", "rows/s", "fill", "GiB, summed")
    for name, key in (("jaxsft", "ours"), ("TRL", "theirs")):
        seconds = statistics.median(each["seconds"] for each in found[key])
        peak = max(each["peak_rss_bytes"] for each in found[key]) / GIB
        fill = f"{found[key][0]['fill']:.1%}"
        table.add_row(
            name, f"{seconds:.1f}", f"{found['rows'] / seconds:,.0f}", fill, f"{peak:.1f}"
        )
    console.print(table)
    console.print(f"TRL takes {found['times_ours']:.1f} x our time, {len(found['ours'])} rounds.")


def _table(first: str, *titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())
