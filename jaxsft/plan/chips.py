"""TPU chips and the slices that Cloud TPU has of them."""

import math
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One TPU chip in SI units: peak is dense bf16, link bandwidth is one link's, one way."""

    name: str
    clock_hz: float
    peak_flops: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    mxu_size: int
    mxu_rows_per_cycle: int


# https://cloud.google.com/tpu/docs/v5e and /v6e: 197 and 918 TFLOP/s; 819 and 1640 GB/s; 1600 and
# 3584 Gbit/s a chip of interconnect, one way, on four links (2D torus). The peaks are those of four
# 128×128 matrix units at 1.5 GHz, and of two 256×256 ones that take two rows a cycle at 1.75 GHz.
CHIPS = {
    "v5e": Chip("v5e", 1.5e9, 197e12, 819e9, 1600e9 / 8 / 4, 128, 1),
    "v6e": Chip("v6e", 1.75e9, 918e12, 1640e9, 3584e9 / 8 / 4, 256, 2),
}

# What the TPU compiler lets a program have of 16 and 32 GiB.
HBM_LIMIT_BYTES = {"v5e": int(15.75 * GIB), "v6e": int(31.25 * GIB)}

# Chips per host, as Cloud TPU offers them: 8 chips in one host, larger slices of hosts with 4.
# https://cloud.google.com/tpu/docs/v5e and /v6e, "Configurations".
_SHAPES = {
    "1x1": (1, 1, 1),
    "2x2": (2, 2, 1),
    "2x4": (2, 4, 1),
    "4x4": (2, 2, 1),
    "4x8": (2, 2, 1),
    "8x8": (2, 2, 1),
    "8x16": (2, 2, 1),
    "16x16": (2, 2, 1),
}
TOPOLOGIES = {
    f"{chip}:{shape}": hosts for chip in ("v5e", "v6e") for shape, hosts in _SHAPES.items()
}


def num_chips(topology: str) -> int:
    """Chips of a topology such as v5e:2x4."""
    return math.prod(int(size) for size in topology.split(":")[1].split("x"))
