"""A command in a process of its own, bound to some cores: its time, and its memory with children's.

Linux only: all figures are of /proc.
"""

import contextlib
import os
import re
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_SAMPLE_S = 0.1


class Usage(NamedTuple):
    """What a command took.

    `peak_rss_bytes` is the largest sum of resident memory over the command's processes, pages that
    two of them share counted twice and mapped files included; `peak_anonymous_bytes` is the same
    without files. `cpu_s` is what all its processes computed.
    """

    seconds: float
    cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    output: str


class CommandError(Exception):
    """A command failed; the text is what it said last."""


def run_measured(
    command: Sequence[str], *, num_cores: int, environment: Mapping[str, str], log: Path
) -> Usage:
    """Runs a command on the first `num_cores` cores; its stderr goes to the file `log`.

    Raises:
      CommandError: it failed.
    """
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    output = log.with_suffix(".out")
    start, cpu_start = time.perf_counter(), _children_cpu_s()
    peak_rss = peak_anonymous = 0
    with log.open("w") as stderr, output.open("w") as stdout:
        # taskset, so that it counts from the first instruction and for every thread.
        process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), *command],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | dict(environment),
        )
        try:
            while process.poll() is None:
                rss, anonymous = _resident_bytes(process.pid)
                peak_rss, peak_anonymous = max(peak_rss, rss), max(peak_anonymous, anonymous)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SAMPLE_S)
        finally:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - start
    text = output.read_text(errors="replace")
    if process.returncode:
        written = f"{text}\n{log.read_text(errors='replace')}".split("\n")
        last = next((line.strip() for line in reversed(written) if line.strip()), "no output")
        raise CommandError(f"{' '.join(command[:3])} … ended with {process.returncode}: {last}")
    return Usage(seconds, _children_cpu_s() - cpu_start, peak_rss, peak_anonymous, text)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
    return usage.ru_utime + usage.ru_stime


def _resident_bytes(pid: int) -> tuple[int, int]:
    """(all, anonymous) resident bytes of a process and all below it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return 0, 0
    kib = {name: int(size) for name, size in re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", status)}
    total, anonymous = 1024 * kib.get("VmRSS", 0), 1024 * kib.get("RssAnon", 0)
    for child in " ".join(children).split():
        below = _resident_bytes(int(child))
        total, anonymous = total + below[0], anonymous + below[1]
    return total, anonymous
