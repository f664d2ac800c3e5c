"""Sets JAX's options for the process; one clear line where JAX cannot open its devices."""

import os
import re
from pathlib import Path

import jax

from jaxsft.common.files import cache_dir


def configure_jax() -> None:
    """float32 products in full, and compiled programs kept for the next process."""
    # float32 means float32 on accelerators too; their default is bfloat16 passes.
    jax.config.update("jax_default_matmul_precision", "highest")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a restart compiles nothing again
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("compiled")))


_GOOGLE = "0x1ae0"  # PCI vendor


def check_device() -> None:
    """Makes sure of the devices that JAX finds, before anything is loaded for them.

    Raises ValueError where JAX finds none, and where this machine has a TPU that JAX was not told
    to leave alone (JAX_PLATFORMS=cpu) and that cannot be opened, because another process has it
    for instance: JAX may say so in a traceback, or train on the CPU after a warning.
    """
    try:
        platform = jax.devices()[0].platform
        device = tpu_device(Path("/"))
        if platform != "cpu" or device is None or os.environ.get("JAX_PLATFORMS"):
            return
        jax.devices("tpu")  # raises, and says why there is none
    except RuntimeError as error:
        raise ValueError(explain_no_device(str(error))) from error


def explain_no_device(message: str) -> str:
    """What to do about JAX's complaint that it cannot start a backend, in one line."""
    go_on = "JAX_PLATFORMS=cpu trains on the CPU on purpose"
    reason = " ".join(message.split())
    # libtpu's texts: jax-ml/jax#22070, #10192; google/gvisor#11545, where the device is busy.
    if process := re.search(r"in use by process with pid (\d+)", reason):
        return (
            f"the TPU is taken by another process, {process[1]}: wait for its end or end it (kill "
            f"{process[1]}), then run the same command again; {go_on}"
        )
    if re.search(r"TPU is already in use|resource busy|libtpu multi-process lockfile", reason):
        return (
            "the TPU is taken by another process: `sudo lsof -w /dev/accel* /dev/vfio/*` shows "
            "which, end it and run the same command again (where there is none, a process that "
            f"died has left a lock: sudo rm /tmp/libtpu_lockfile); {go_on}"
        )
    if "no platforms that are instances of tpu" in reason or "Unknown backend tpu" in reason:
        return (
            "this machine has a TPU and JAX does not find it: pip install 'jaxsft[tpu]' if libtpu "
            f"is not installed; {go_on}"
        )
    return f"JAX cannot start the device: {reason}; {go_on}"


def tpu_device(root: Path) -> Path | None:
    """A TPU's device file under `root`, which is / but in tests; None on a machine without one.

    /dev/accel0 on older kernels and chips, else a group in /dev/vfio, which other vendors' devices
    have as well (ray-project/ray#65034).
    """
    for path in sorted(root.glob("dev/accel[0-9]*")):
        return path
    for path in sorted(root.glob("dev/vfio/[0-9]*")):
        vendors = root.glob(f"sys/kernel/iommu_groups/{path.name}/devices/*/vendor")
        if any(vendor.read_text(encoding="ascii").strip() == _GOOGLE for vendor in vendors):
            return path
    return None
