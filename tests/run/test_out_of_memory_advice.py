"""What devices refuse: real messages and what is made of them, on a machine that needs no TPU."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxsft.common import devices
from jaxsft.common.devices import check_device
from jaxsft.common.out_of_memory import Shortage, parse_shortage
from jaxsft.plan.chips import TOPOLOGIES
from jaxsft.run import out_of_memory
from jaxsft.run.out_of_memory import explain_out_of_memory, plan_options, tpu_topology

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 18.25G of 15.75G hbm. Exceeded hbm capacity by 2.50G.\n\nTotal hbm "
            "usage >= 18.77G:\n    reserved        530.00M\n    program          18.25G",
            ("hbm", 18.25 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (28.75G) exceeds available HBM (15.75G).",
            ("hbm", 28.75 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 256.00M of 128.00M "
            "vmem. Exceeded vmem capacity by 128.00M.",
            ("vmem", 256 * MIB, 128 * MIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.50G. "
            "That was not possible. There are 1.25G free.; (0x0x0_HBM0)",
            (None, 2.5 * GIB, 1.25 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Attempting to allocate 31.50M. That was not possible. There are "
            "58.50M free. Due to fragmentation, the largest contiguous region of free memory is "
            "30.50M.; (0x0x0_HBM0)",
            (None, 31.5 * MIB, 30.5 * MIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Error loading program 'jit_train_step': Attempting to reserve "
            "6.50G at the bottom of memory. That was not possible. There are 6.75G free, 0B "
            "reserved, and 3.25G reservable.",
            (None, 6.5 * GIB, 3.25 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\n"
            "BufferAssignment OOM Debugging.\n             parameter allocation:  372.76MiB",
            (None, 16 * GIB, None),
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00GiB.",
            (None, 16 * GIB, None),
        ),
        (
            "RESOURCE_EXHAUSTED: Allocator (GPU_0_bfc) ran out of memory trying to allocate "
            "2.00GiB with freed_by_count=0.",
            (None, 2 * GIB, None),
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device "
            "ordinal 0",
            (None, 176 * MIB, None),
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.",
            (None, 1024 * GIB, None),
        ),
        ("Resource exhausted: Out of memory allocating 512 bytes.", (None, 512, None)),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", (None, None, None)),
    ],
)
def test_messages_of_memory_that_ran_out(message: str, expected: tuple[Any, ...]) -> None:
    assert parse_shortage(message) == Shortage(*expected)


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: Mosaic failed to compile",
        "RESOURCE_EXHAUSTED: Received message larger than max (5242880 vs. 4194304)",
        "INVALID_ARGUMENT: Used 3 of 2 arguments",
    ],
)
def test_other_errors_are_not_explained(message: str) -> None:
    assert parse_shortage(message) is None
    assert explain_out_of_memory(jax.errors.JaxRuntimeError(message), []) is None


# --- the way out of it ---

NEAREST = {"options": "--gradient_accumulation_steps 4 --model.remat full", "gib": 12.5}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any] | None], list[Any]]:
    """Makes the process of jaxsft.plan write these values, or fail; returns what it is called with.

    The machine has eight v5e chips.
    """

    def planned(values: dict[str, Any] | None) -> list[Any]:
        calls: list[Any] = []

        def run(*call: Any) -> str:
            calls.append(call)
            if values is not None:
                path = call[0][call[0].index("--json") + 1]
                Path(path).write_text(json.dumps(values))
            return "no such recipe"

        chip = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
        monkeypatch.setattr(jax, "devices", lambda: [chip] * 8)
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        monkeypatch.setattr(out_of_memory, "_run", run)
        return calls

    return planned


HBM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm."


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            {"fits": False, "nearest": NEAREST},
            "the next smaller setting that fits, by jaxsft.plan: --gradient_accumulation_steps 4 "
            "--model.remat full (12.50 GiB)",
        ),
        (
            {"fits": True},
            "the train step itself fits: lower eval.batch_size or eval.max_new_tokens, or end what "
            "else uses this memory",
        ),
        (
            {"fits": False, "nearest": None},
            "no number of micro-batches and no remat policy makes the train step fit: use more "
            "devices, model.param_dtype bfloat16, or a smaller model",
        ),
        (
            None,
            "raise gradient_accumulation_steps, set model.remat to full, or lower data.max_length, "
            "eval.batch_size or, in grpo, rollout.batch_size "
            "(jaxsft.plan found no setting: no such recipe)",
        ),
    ],
)
def test_advice_is_what_plan_finds(
    planned: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any] | None,
    advice: str,
) -> None:
    calls = planned(values)
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "0")
    error = jax.errors.JaxRuntimeError(HBM)
    line = explain_out_of_memory(error, ["--config=r.yaml", "--preflight"], 60)
    assert line == f"out of memory: needed 18.25 GiB, available 15.75 GiB; {advice}"
    assert "a few minutes" in capsys.readouterr().err
    ((command, environment, limit_s),) = calls
    assert command[1:6] == ["-m", "jaxsft.plan", "--config=r.yaml", "--topology", "v5e:2x4"]
    # Nothing in it may open the chips, which this process holds.
    assert environment["JAX_PLATFORMS"] == "cpu" and "TPU_VISIBLE_CHIPS" not in environment
    assert limit_s == 60


def test_on_chip_memory_needs_no_plan(planned: Callable[..., list[Any]]) -> None:
    calls = planned({})
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 256.00M of 128.00M vmem."
    line = explain_out_of_memory(jax.errors.JaxRuntimeError(message), [])
    assert line is not None and calls == []
    assert line.startswith("out of memory: needed 256.00 MiB, available 128.00 MiB; that is")
    assert "use a lower data.max_length" in line


def test_what_cpus_have_is_asked_of_the_system() -> None:
    """More than 64 MiB are free, and less than all memory."""
    free = out_of_memory.free_memory(jax.local_devices())
    assert free is not None
    assert 64 * MIB < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_other_devices_have_is_what_they_count() -> None:
    def device(**stats: int) -> Any:
        return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    devices = [device(bytes_limit=100, bytes_in_use=n) for n in (40, 70)]
    assert out_of_memory.free_memory([*devices, device()]) == 30
    assert out_of_memory.free_memory([device()]) is None


def test_slices_are_named_as_plan_names_them() -> None:
    sizes = (1, 4, 8, 16, 32, 64, 128, 256)
    found = [tpu_topology("TPU v6 lite", size) for size in sizes]
    assert found == [name for name in TOPOLOGIES if name.startswith("v6e")]
    assert tpu_topology("TPU v5 lite", 8) == "v5e:2x4"
    for kind, size in (("TPU v4", 8), ("TPU v5 lite", 2), ("TPU v5 lite", 6), ("TPU v5e", 512)):
        assert tpu_topology(kind, size) is None


def test_plan_gets_the_options_of_the_run() -> None:
    budgets = ["--budget-hours", "9", "--budget_hours=9"]
    assert plan_options(["--preflight", "--config", "a.yaml", *budgets, "--lora.r", "8"]) == [
        *("--config", "a.yaml", "--lora.r", "8")
    ]
    assert plan_options(["--lora.r=8"]) == ["--config", "demo", "--lora.r=8"]


def run_shell(script: str, limit_s: float) -> str:
    return out_of_memory._run(["bash", "-c", script], dict(os.environ), limit_s)


def test_the_search_ends_with_all_that_it_started() -> None:
    """A process left behind would hold stderr open, for which `_run` waits."""
    assert run_shell("echo 'error: no such recipe' >&2; exit 2", 60) == "no such recipe"
    assert run_shell("exit 2", 60) == "exit 2"
    assert run_shell("sleep 1000 & wait", 0.2) == "not within 0.2 s"
    for name in ("INT", "TERM"):
        assert run_shell(f"sleep 1000 & kill -{name} $PPID; wait", 60) == "interrupted"


# --- a TPU that is taken ---

BUSY = (
    "Unable to initialize backend 'tpu': {} (set JAX_PLATFORMS='' to automatically choose an "
    "available backend)"
)
UNKNOWN = (
    "Unknown backend: 'tpu' requested, but no platforms that are instances of tpu are present. "
    "Platforms present are: cpu"
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            BUSY.format(
                "ABORTED: The TPU is already in use by process with pid 2718466. Not attempting to "
                "load libtpu.so in this process."
            ),
            "taken by another process, 2718466: .* end it .kill 2718466., then run the same",
        ),
        (
            BUSY.format(
                "ABORTED: The TPU is already in use by another process probably owned by another "
                'user. Run "$ sudo lsof -w /dev/accel0" to figure out which process is using the '
                'TPU. If you still get this message, run "$ sudo rm /tmp/libtpu_lockfile".'
            ),
            "taken by another process: `sudo lsof .* rm /tmp/libtpu_lockfile",
        ),
        (
            BUSY.format(
                "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
                '"$ sudo rm /tmp/libtpu_lockfile".'
            ),
            "taken by another process: `sudo lsof .* rm /tmp/libtpu_lockfile",
        ),
        (
            BUSY.format(
                "UNKNOWN: TPU initialization failed: open(/dev/vfio/1): Device or resource busy: "
                "Device or resource busy; Couldn't open iommu group /dev/vfio/1"
            ),
            "taken by another process: `sudo lsof",
        ),
        (
            BUSY.format("UNAVAILABLE: No TPU Platform available."),
            "^JAX cannot start the device: .*UNAVAILABLE: No TPU Platform available",
        ),
        (
            "Unable to initialize backend 'cuda': no supported devices",
            "^JAX cannot start the device: Unable to initialize backend 'cuda'",
        ),
    ],
)
def test_devices_that_do_not_start_are_one_line(
    monkeypatch: pytest.MonkeyPatch, message: str, expected: str
) -> None:
    def refuse() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(jax, "devices", refuse)
    with pytest.raises(ValueError, match=expected) as raised:
        check_device()
    assert str(raised.value).endswith("JAX_PLATFORMS=cpu trains on the CPU on purpose")
    assert "\n" not in str(raised.value)


def test_training_on_the_cpu_beside_a_tpu_is_only_on_purpose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def jax_devices(platform: str | None = None) -> list[Any]:
        if platform == "tpu":
            raise RuntimeError(UNKNOWN)
        return [SimpleNamespace(platform="cpu")]

    monkeypatch.setattr(jax, "devices", jax_devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(devices, "tpu_device", lambda root: None)
    check_device()
    monkeypatch.setattr(devices, "tpu_device", lambda root: root / "dev/accel0")
    with pytest.raises(ValueError, match=re.escape("pip install 'jaxsft[tpu]'")):
        check_device()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    check_device()


def test_tpus_are_told_from_other_devices(tmp_path: Path) -> None:
    assert devices.tpu_device(tmp_path) is None
    for group, vendor in (("7", "0x15b3"), ("96", "0x1ae0")):
        (tmp_path / "dev/vfio").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev/vfio" / group).touch()
        directory = tmp_path / f"sys/kernel/iommu_groups/{group}/devices/0000:00:04.0"
        directory.mkdir(parents=True)
        (directory / "vendor").write_text(f"{vendor}\n")
    assert devices.tpu_device(tmp_path) == tmp_path / "dev/vfio/96"
    (tmp_path / "dev/accel0").touch()
    assert devices.tpu_device(tmp_path) == tmp_path / "dev/accel0"
