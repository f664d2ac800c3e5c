"""Generation beside transformers' `generate`: `python -m benchmarks.sampling`.

Both answer the same prompts, of different lengths, with the pretrained Gemma 3 270M in float32 on
the same cores: greedy, with a cache, the same number of new tokens, stop tokens ignored;
transformers with its scaled-dot-product attention. The sides take turns in one process; a turn is
one call for a whole batch, prefill included, and each has had one before, which compiles. The
figure is new tokens a second, of the median turn.

The answers must agree: no token of ours is more than 1e-2 below transformers' best logit after the
same tokens.

Exit codes: 0 done; 1 slower than the goals, or the answers differ; 2 bad input.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, fail
from jaxsft.common.files import write_json
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma import lora
from jaxsft.gemma.decode import SamplingOptions, generate
from jaxsft.weights.load import demo_model_path, load_model

PROMPTS = Path(__file__).parents[1] / "data" / "sample" / "train.jsonl"
GOALS = {1: 1.0, 8: 1.0, 16: 1.5}  # batch size -> how many times as fast
NEAR_TIE = 1e-2
NEVER = (-1,)  # a stop id that is no token


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    # Logs have room, whatever the terminal has.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    args = _parse(argv)
    try:
        if args.rounds < 1 or args.new_tokens < 1:
            raise ValueError("--rounds and --new-tokens must be at least 1")
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= args.threads <= len(cores):
            raise ValueError(f"--threads {args.threads}: this process has {len(cores)} cores")
        # XLA takes as many threads as the process has cores.
        os.sched_setaffinity(0, cores[: args.threads])
        values = measure(args, console)
        if args.json:
            write_json(args.json, values)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    missed = [
        f"{row['ratio']:.2f}× at batch {row['batch']} of {GOALS[row['batch']]}×"
        for row in values["rows"]
        if row["ratio"] < GOALS[row["batch"]]
    ]
    if values["largest_gap"] > NEAR_TIE:
        missed.append(f"a token of ours is {values['largest_gap']:.3g} below transformers' best")
    console.print(f"NOT GOOD: {'; '.join(missed)}." if missed else "Good: every goal is reached.")
    return EXIT_FAILED if missed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling",
        description=(__doc__ or "").split(":")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batches", type=int, nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Both sides at every batch size, shown as they come."""
    import torch

    torch.set_num_threads(args.threads)
    path = demo_model_path()
    tokenizer = Tokenizer.from_gguf(path)
    texts = [row["prompt"] for _, row in read_rows(PROMPTS)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts[: max(GOALS)]]
    split = lora.split(load_model(path, dtype="float32", param_dtype="float32")[0])
    peer = load_peer(path)
    lengths = [len(prompt) for prompt in prompts]
    console.print(
        f"{args.new_tokens} new tokens after {min(lengths)} to {max(lengths)}, "
        f"{args.threads} threads, median of {args.rounds}; load {os.getloadavg()[0]:.1f}"
    )
    table = Table("batch", "ours, tokens/s", "transformers, tokens/s", "ratio", "goal")
    rows, gaps = [], []
    for batch in args.batches:
        options = SamplingOptions(batch_size=batch, max_new_tokens=args.new_tokens)
        given = prompts[:batch]

        def ours(options: SamplingOptions = options, given: list[list[int]] = given) -> Any:
            return generate(*split, given, options=options, stop_ids=NEVER)

        def theirs(given: list[list[int]] = given) -> Any:
            return peer_generate(peer, given, args.new_tokens)

        answers = [answer.ids for answer in ours()]
        theirs()
        gaps.append(largest_gap(peer, given, answers))
        seconds = take_turns([ours, theirs], args.rounds)
        rates = [batch * args.new_tokens / statistics.median(s) for s in seconds]
        row = {"batch": batch, "ours": rates[0], "transformers": rates[1]}
        rows.append(row | {"ratio": rates[0] / rates[1], "seconds": seconds})
        cells = (f"{rate:.1f}" for rate in rates)
        table.add_row(str(batch), *cells, f"{rates[0] / rates[1]:.2f}×", f"{GOALS[batch]}×")
    console.print(table)
    console.print(f"ours is at most {max(gaps):.2g} below transformers' best logit")
    return {"rows": rows, "largest_gap": max(gaps)}


def take_turns(calls: Sequence[Callable[[], Any]], num_rounds: int) -> list[list[float]]:
    """Seconds of every call, by call."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(num_rounds):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return seconds


def load_peer(path: Path) -> Any:
    """transformers' model of the same file, float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def peer_generate(peer: Any, prompts: Sequence[list[int]], num_new_tokens: int) -> Any:
    """transformers' greedy answers to `prompts`, padded on the left as it wants them."""
    import torch

    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return peer.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=num_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def largest_gap(peer: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """How far a token of ours is below the peer's best logit after the same tokens, at most."""
    import torch

    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = peer(tokens, logits_to_keep=len(answer) + 1).logits[0, :-1]
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
        gaps.append(float((logits.max(-1).values - chosen).max()))
    return max(gaps)


if __name__ == "__main__":
    sys.exit(main())
