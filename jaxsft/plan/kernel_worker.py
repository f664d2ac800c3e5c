"""Compile Pallas kernels alone, with libtpu's dump on: the subprocess of `kernel_price`.

The flags that turn the dump on are read when libtpu is loaded and slow every compilation in the
process down, hence a process of its own and programs of one kernel each.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsft.plan.tpu_aot import topology_devices

_DTYPES = {"bf16": "bfloat16", "pred": "bool"}


def _array(described: tuple[str, list[int]], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """HLO's element type, such as s32, as JAX's."""
    dtype, dims = described
    name = _DTYPES.get(dtype) or {"s": "int", "u": "uint", "f": "float"}[dtype[0]] + dtype[1:]
    return jax.ShapeDtypeStruct(tuple(dims), jnp.dtype(name), sharding=sharding)


def compile_kernels(specification: Path, dump: Path) -> None:
    """Compile each kernel of a JSON file and leave its bundles in `dump`/<key>.bundles.

    The file: {"topology", "kernels": {key: {"config", "operands", "results"}}},
    operands and results as [element type, dims].
    """
    wanted = json.loads(specification.read_text())
    device = topology_devices(wanted["topology"])[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    seen: set[Path] = set()
    for key, kernel in wanted["kernels"].items():
        operands = [_array(operand, sharding) for operand in kernel["operands"]]
        results = [_array(result, sharding) for result in kernel["results"]]
        call: Any = jax.ffi.ffi_call(
            "tpu_custom_call",
            results,
            custom_call_api_version=1,
            legacy_backend_config=kernel["config"],
        )
        jax.jit(call).lower(*operands).compile()
        bundles = set(dump.glob("*-ffi_call*final_bundles.txt")) - seen
        seen |= bundles
        (path,) = (path for path in bundles if "schedule-analysis" not in path.name)
        path.rename(dump / f"{key}.bundles")
