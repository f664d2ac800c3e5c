"""Whether this machine has a TPU, without JAX; libtpu's errors where there is none."""

from collections.abc import MutableMapping
from pathlib import Path

_GOOGLE = "0x1ae0"  # PCI vendor


def tpu_device(root: Path) -> Path | None:
    """The device file of a TPU under `root` (/ except in tests); None if there is no TPU.

    It is /dev/accel0 with older kernels and chips, else a group in /dev/vfio. Devices of other
    vendors are there too (ray-project/ray#65034).
    """
    for path in sorted(root.glob("dev/accel[0-9]*")):
        return path
    for path in sorted(root.glob("dev/vfio/[0-9]*")):
        vendors = root.glob(f"sys/kernel/iommu_groups/{path.name}/devices/*/vendor")
        if any(vendor.read_text(encoding="ascii").strip() == _GOOGLE for vendor in vendors):
            return path
    return None


def keep_libtpu_quiet(environment: MutableMapping[str, str], root: Path) -> None:
    """Sets what libtpu asks for where this machine has no TPU, before JAX is imported.

    JAX tries the TPU first wherever libtpu is installed, for `plan` say. Without a TPU libtpu then
    writes six lines on what it could not find out, past every log level. With these two it finds
    no chip, silently, and JAX goes on to a GPU or the CPU. A user who names the platform, or
    anything of the TPU, keeps what libtpu says.

    Args:
      environment: of this process, and of those that it starts.
      root: / except in tests.
    """
    has_device = any((*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*")))
    is_named = any(name.startswith("TPU_") for name in environment)
    if not (has_device or is_named or environment.get("JAX_PLATFORMS")):
        environment["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"  # any will do
        environment["TPU_WORKER_HOSTNAMES"] = "localhost"
