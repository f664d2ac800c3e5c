"""How fast the sandbox runs programs, what endless ones cost, and whether MBPP's solutions pass.

    python -m benchmarks.sandbox mbpp.jsonl

The file has MBPP's rows (https://huggingface.co/datasets/google-research-datasets/mbpp). Ends with
exit code 1 if a bound is missed: 150 programs a second, 20 seconds for 128 endless programs, 371 of
the 374 training solutions.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsft.rewards.code_tests import run_tests, split_tests
from jaxsft.rewards.sandbox import Sandbox, SandboxJob

SQUARE = SandboxJob("def f(x):\n    return x * x", "", ("f(2)", "f(3)", "f(4)"))
ENDLESS = SandboxJob("def f(x):\n    while True: pass", "", ("f(2)",))


def timed(what: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives and its seconds; prints wall time and CPU time of this process."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{what}: {wall:.2f} s, of which this process computed {cpu:.2f} s", flush=True)
    return result, wall


def main() -> None:
    """Measures, prints, and ends with 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="MBPP's rows as JSON lines")
    parser.add_argument("--first", type=int, default=601, help="the first task_id")
    parser.add_argument("--last", type=int, default=974, help="the last task_id")
    parser.add_argument("--programs", type=int, default=600, help="short programs to time")
    parser.add_argument("--endless", type=int, default=128, help="endless programs to time")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.file.read_text("utf-8").splitlines()]
    rows = [row for row in rows if options.first <= row["task_id"] <= options.last]
    split = [split_tests(row["test_list"], row["test_setup_code"]) for row in rows]
    attempts = [
        (row["code"], tests)
        for row, tests in zip(rows, split, strict=True)
        if not isinstance(tests, str)
    ]
    print(f"{len(rows)} rows, {len(rows) - len(attempts)} with tests that can't be split")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    with Sandbox() as sandbox:
        rewards, _ = timed("their solutions", lambda: run_tests(sandbox, attempts))
        right = sum(reward.value == 1 for reward in rewards)
        print(f"  {right} of {len(rows)} earn all")
        for (code, _), reward in zip(attempts, rewards, strict=True):
            if reward.value < 1:
                print(f"  {reward.value:.2f} {reward.reason}: {code.splitlines()[0]!r}")
        _, wall = timed(
            f"{options.programs} short programs", lambda: sandbox.run([SQUARE] * options.programs)
        )
        rate = options.programs / wall
        print(f"  {rate:.0f} programs/s")
        _, slow = timed(
            f"{options.endless} endless programs", lambda: sandbox.run([ENDLESS] * options.endless)
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"the programs and the helper: {used.ru_utime + used.ru_stime:.1f} s of CPU time")
    missed = rate < 150 or slow > 20 or right < len(rows) * 371 / 374
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
