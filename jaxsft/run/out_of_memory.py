"""Explains an out-of-memory error in one line, with the next smaller setting that fits."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxsft.cli import DEFAULT_RECIPE
from jaxsft.common.out_of_memory import GENERAL_ADVICE, Shortage, parse_shortage
from jaxsft.common.signals import hears_signals
from jaxsft.gemma.sharding import CHIP_NAMES

SEARCH_SECONDS = 600.0


def explain_out_of_memory(
    error: Exception, argv: Sequence[str], search_seconds: float = SEARCH_SECONDS
) -> str | None:
    """Memory needed, memory available, and the next smaller setting that fits, in one line.

    None where the error is about something else. `argv` are the run's own options. `jaxsft.plan`
    searches the setting in another process, which a line on stderr announces; after
    `search_seconds`, or a signal, the advice is general.

    The run is over: its arrays are deleted, because the search needs their memory.
    """
    shortage = parse_shortage(str(error))
    if shortage is None:
        return None
    line = f"out of memory: {_amounts(shortage, str(error))}"
    if shortage.memory in ("vmem", "smem"):
        return (
            f"{line}; that is the chip's on-chip memory, which holds the blocks that a kernel "
            "works on: use a lower data.max_length, or step plain, which has no such kernels"
        )
    if jax.process_index() > 0:
        return f"{line}; {GENERAL_ADVICE}"
    found = _plan(argv, search_seconds)
    if isinstance(found, str):
        return f"{line}; {GENERAL_ADVICE} ({found})"
    if found["fits"]:
        return (
            f"{line}; the train step itself fits: lower eval.batch_size or eval.max_new_tokens, or "
            "end what else uses this memory"
        )
    if found["nearest"] is None:
        return (
            f"{line}; no number of micro-batches and no remat policy makes the train step fit: use "
            "more devices, model.param_dtype bfloat16, or a smaller model"
        )
    nearest = found["nearest"]
    return (
        f"{line}; the next smaller setting that fits, by jaxsft.plan: {nearest['options']} "
        f"({nearest['gib']:.2f} GiB)"
    )


def _amounts(shortage: Shortage, message: str) -> str:
    """Needed and available memory; XLA's own first line where it names none."""
    available = shortage.available_bytes
    if available is None:
        available = free_memory(jax.local_devices())
    needed = message.splitlines()[0]
    if shortage.needed_bytes is not None:
        needed = f"needed {_size(shortage.needed_bytes)}"
    return needed if available is None else f"{needed}, available {_size(available)}"


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.2f} {name}"


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that can still be allocated on each device (on CPUs: on all together); None where the
    devices do not tell."""
    if devices[0].platform == "cpu":
        return _free_host_memory()
    known = [
        stats["bytes_limit"] - stats["bytes_in_use"]
        for device in devices
        if (stats := device.memory_stats()) and {"bytes_limit", "bytes_in_use"} <= stats.keys()
    ]
    return min(known, default=None)


def _free_host_memory() -> int | None:
    """Free memory of the system, within this process's own limits (ulimit -v, -d)."""

    def kilobytes(path: str, name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path(path).read_text(encoding="ascii"), re.M)
        assert found is not None
        return int(found[1])

    try:
        free = [1024 * kilobytes("/proc/meminfo", "MemAvailable")]
        for which, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            limit, _ = resource.getrlimit(which)
            if limit != resource.RLIM_INFINITY:
                free.append(limit - 1024 * kilobytes("/proc/self/status", used))
    except OSError:  # not Linux
        return None
    return max(min(free), 0)


def _plan(argv: Sequence[str], search_seconds: float) -> dict[str, Any] | str:
    """What `jaxsft.plan` finds for this machine's devices; a text says why it found nothing."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        topology = tpu_topology(device.device_kind, jax.device_count())
        if topology is None:
            return f"jaxsft.plan does not know {jax.device_count()} x {device.device_kind}"
    else:
        topology = "local"
        for array in jax.live_arrays():
            array.delete()
    print(
        "out of memory: looking for the next smaller setting that fits, a few minutes "
        "(Ctrl-C skips it) …",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "jaxsft.plan", *plan_options(argv)]
        command += ["--topology", topology, "--json", str(path)]
        if topology != "local":  # the recipe's own would need the number of steps
            command += ["--budget_hours", "null"]
        errors = _run(command, plan_environment(device.platform, os.environ), search_seconds)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"jaxsft.plan found no setting: {errors}"
    assert isinstance(found, dict)
    return found


def tpu_topology(device_kind: str, num_chips: int) -> str | None:
    """The plan's name for a slice of so many chips, such as v5e:2x4; None for an unknown one.

    Cloud TPU's slices of a power of two are as square as can be, the shorter side first, from 1 to
    256 chips; those of 2 and 512 are not offered.
    """
    chip, power = CHIP_NAMES.get(device_kind), num_chips.bit_length() - 1
    if chip is None or num_chips != 2**power or power == 1 or power > 8:
        return None
    shorter = 2 ** (power // 2)
    return f"{chip}:{shorter}x{num_chips // shorter}"


def plan_options(argv: Sequence[str]) -> list[str]:
    """The run's options as `plan` takes them, with the recipe that `train` would use."""
    options = list(argv)
    if not any(re.match("--config(=|$)", option) for option in options):
        options = ["--config", DEFAULT_RECIPE, *options]
    kept = []
    for before, option in zip(["", *options], options, strict=False):
        is_not_plans = re.match("--(budget[-_]hours|preflight)(=|$)", option)
        is_its_value = re.fullmatch("--budget[-_]hours", before) or (
            before == "--preflight" and not option.startswith("-")
        )
        if not (is_not_plans or is_its_value):
            kept.append(option)
    return kept


def plan_environment(platform: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process beside this one, which holds the devices."""
    if platform == "tpu":
        # The topology is plan's to say, and the chips are not to be touched.
        own = ("TPU_LIBRARY_PATH",)
        kept = {k: v for k, v in environment.items() if k in own or not k.startswith("TPU_")}
        return kept | {"JAX_PLATFORMS": "cpu"}
    if platform == "cpu":
        return {**environment, "JAX_PLATFORMS": "cpu"}
    # This process has three quarters of the GPU, by default; plan only compiles.
    return {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def _run(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> str:
    """Runs a command until it ends, the limit is over or a signal comes, and kills what it started.

    Returns the last line of its stderr."""
    processes: list[subprocess.Popen[str]] = []
    signals: list[int] = []

    def kill() -> None:
        for process in processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)

    def stop(number: int, _: object) -> None:
        signals.append(number)
        kill()

    taken = (signal.SIGINT, signal.SIGTERM) if hears_signals() else ()
    handlers = {each: signal.signal(each, stop) for each in taken}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # plan compiles kernels in a process of its own
        )
        processes.append(process)
        if signals:
            kill()
        try:
            _, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            kill()
            process.communicate()
            return f"not within {limit_s:g} s"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        return "interrupted"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit {process.returncode}"
