"""Sets JAX's options for the process; explains why JAX cannot open its devices."""

import os
import re
from pathlib import Path

import jax

from jaxsft.common.files import cache_dir
from jaxsft.common.tpu import tpu_device


def configure_jax() -> None:
    """Sets full precision for float32 products, and a cache of compiled programs on disk."""
    # The default on accelerators is bfloat16 passes, even for float32 operands.
    jax.config.update("jax_default_matmul_precision", "highest")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # so that a restart need not compile
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("compiled")))


def check_device() -> None:
    """Checks that JAX can open its devices, before anything is loaded.

    Without it JAX may only warn that it cannot open the TPU, and train on the CPU.

    Raises:
        ValueError: JAX finds no device; or this machine has a TPU that cannot be opened (another
            process may hold it) and JAX_PLATFORMS is not set.
    """
    try:
        platform = jax.devices()[0].platform
        device = tpu_device(Path("/"))
        if platform != "cpu" or device is None or os.environ.get("JAX_PLATFORMS"):
            return
        jax.devices("tpu")  # raises an error that says why there is none
    except RuntimeError as error:
        raise ValueError(explain_no_device(str(error))) from error


def explain_no_device(message: str) -> str:
    """One line on what to do about JAX's error that it cannot start a backend."""
    go_on = "JAX_PLATFORMS=cpu trains on the CPU on purpose"
    reason = " ".join(message.split())
    # Texts of libtpu: jax-ml/jax#22070, #10192; google/gvisor#11545 for a busy device.
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
