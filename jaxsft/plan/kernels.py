"""The time of the Pallas kernels in a compiled TPU program.

HLO says nothing about the time of a Pallas call. So each distinct kernel is compiled alone, in a
subprocess, and its static schedule (module `llo`) is cached. A kernel costs the larger of two
times: the schedule's cycles over the clock, and its DMAs' bytes over HBM bandwidth. Operands lie in
the same memory (HBM or VMEM) as in the program. Prefetched operands that are constants decide how
often conditional regions run. Waits for single DMAs, such as the first and last of a grid, are not
modelled.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsft.common.files import whole_file
from jaxsft.plan.hlo import (
    HBM,
    VMEM,
    Array,
    Callers,
    Computation,
    Instruction,
    Program,
    constant_words,
    parse_program,
)
from jaxsft.plan.llo import schedule
from jaxsft.plan.pricing import Chip
from jaxsft.plan.tpu_aot import CompilerError, compiler_flags, one_line, topology_devices

_WORKER = (
    "import pathlib, sys; from jaxsft.plan.kernels import compile_kernels; "
    "compile_kernels(*map(pathlib.Path, sys.argv[1:]))"
)


class KernelCall(NamedTuple):
    """A Pallas call. `words` has the constant operands as 32-bit words, by index."""

    name: str
    config: str  # the custom call's backend_config, JSON
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    words: dict[int, list[int]]


class KernelPrice(NamedTuple):
    """One run of a Pallas call; `seconds` is the larger of the cycles' and the bytes' time."""

    seconds: float
    cycles: int
    hbm_bytes: int
    matmul_flops: int
    assumptions: tuple[str, ...]


def find_kernels(program: Program) -> list[KernelCall]:
    """The Pallas calls that the entry computation reaches."""
    return list(_kernels(program, program.entry, ()))


def _kernels(program: Program, name: str, callers: Callers) -> Iterator[KernelCall]:
    computation = program.computations[name]
    for instruction in computation.values():
        if instruction.opcode == "while":
            inside = (*callers, (computation, instruction))
            yield from _kernels(program, instruction.called("body"), inside)
        elif instruction.opcode == "call":
            yield from _kernels(program, instruction.called("to_apply"), callers)
        elif instruction.opcode == "conditional":
            for branch in instruction.branches:
                yield from _kernels(program, branch, callers)
        elif instruction.custom_call_target == "tpu_custom_call":
            yield _kernel_call(program, computation, instruction, callers)


def _kernel_call(
    program: Program, computation: Computation, call: Instruction, callers: Callers
) -> KernelCall:
    operands = tuple(computation[name].arrays[0] for name in call.operands)
    found = re.search(r"backend_config=(\{.*\})\s*$", call.attributes, re.S)
    assert found is not None, call.name
    config = json.loads(found.group(1))
    # The memory of each operand and result in the program: the compiler may keep them in VMEM.
    kernel: dict[str, Any] = config["custom_call_config"]
    kernel["input_memory_space_colors"] = [
        {"operand_index": index, "color": array.memory_space}
        for index, array in enumerate(operands)
        if array.memory_space in (HBM, VMEM)
    ]
    kernel["output_memory_space_colors"] = [
        {"color": array.memory_space} | ({"shape_index": [index]} if len(call.arrays) > 1 else {})
        for index, array in enumerate(call.arrays)
        if array.memory_space in (HBM, VMEM)
    ]
    kept = ("custom_call_config", "scoped_memory_configs", "flag_configs")
    return KernelCall(
        name=call.name,
        config=json.dumps({key: config[key] for key in kept if config.get(key)}),
        operands=operands,
        results=call.arrays,
        words={
            index: words
            for index, name in enumerate(call.operands)
            if (words := constant_words(program, computation, name, callers)) is not None
        },
    )


def price_kernels(
    hlo_text: str,
    chip: Chip,
    topology: str,
    cache_dir: Path,
    environment: Mapping[str, str],
) -> dict[str, KernelPrice]:
    """Prices of the Pallas calls of a program, by instruction name.

    Args:
        hlo_text: `tpu_aot.Compiled.hlo_text`, with the constants that `as_text()` leaves out.
        chip: the chip that the program was compiled for.
        topology: its name, as for `tpu_aot.topology_devices`.
        cache_dir: directory for the schedules of kernels, compressed, about 100 KB each.
        environment: environment variables of the subprocess, including `AOT_ENVIRONMENT`.

    Raises CompilerError for a kernel that does not compile alone.
    """
    kernels = find_kernels(parse_program(hlo_text))
    paths = {}
    missing = {}
    for kernel in kernels:
        described = {
            "config": kernel.config,
            "operands": [(array.dtype, array.dims) for array in kernel.operands],
            "results": [(array.dtype, array.dims) for array in kernel.results],
        }
        identity = [described, topology, version("libtpu"), compiler_flags(environment)]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        paths[kernel.name] = cache_dir / f"{key}.bundles.gz"
        if not paths[kernel.name].exists():
            missing[key] = described
    if missing:
        _compile(missing, topology, cache_dir, environment)
    return {
        kernel.name: _price(gzip.decompress(paths[kernel.name].read_bytes()).decode(), kernel, chip)
        for kernel in kernels
    }


def _price(bundles: str, kernel: KernelCall, chip: Chip) -> KernelPrice:
    found = schedule(bundles, chip.mxu_rows_per_cycle, kernel.words)
    return KernelPrice(
        seconds=max(found.cycles / chip.clock_hz, found.hbm_bytes / chip.hbm_bytes_per_s),
        cycles=found.cycles,
        hbm_bytes=found.hbm_bytes,
        matmul_flops=2 * found.mxu_rows * chip.mxu_size**2,
        assumptions=found.assumptions,
    )


def _compile(
    kernels: dict[str, Any],
    topology: str,
    cache_dir: Path,
    environment: Mapping[str, str],
) -> None:
    """Compiles kernels in a subprocess and stores their bundles in `cache_dir`.

    CompilerError has the last line of the subprocess's messages.
    """
    with tempfile.TemporaryDirectory() as temporary:
        dump = Path(temporary)
        specification = dump / "kernels.json"
        specification.write_text(json.dumps({"topology": topology, "kernels": kernels}))
        flags = (
            f"{environment.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump}"
            " --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        finished = subprocess.run(
            [sys.executable, "-c", _WORKER, specification, dump],
            # A compilation that a cache answers leaves no dump.
            env={
                **environment,
                "LIBTPU_INIT_ARGS": flags.strip(),
                "JAX_ENABLE_COMPILATION_CACHE": "false",
            },
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        if finished.returncode != 0:
            lines = [line for line in finished.stderr.splitlines() if line.strip()]
            message = one_line(lines[-1]) if lines else "no message"
            raise CompilerError(f"a Pallas kernel does not compile alone: {message}")
        cache_dir.mkdir(parents=True, exist_ok=True)
        for key in kernels:
            compressed = gzip.compress((dump / f"{key}.bundles").read_bytes(), mtime=0)
            with whole_file(cache_dir / f"{key}.bundles.gz") as path:
                path.write_bytes(compressed)


# --- the subprocess ---
# libtpu reads the flags of the dump when it is loaded, and they slow down every compilation of the
# process. So kernels are compiled in a process of their own, one kernel a program.

_DTYPES = {"bf16": "bfloat16", "pred": "bool"}


def _array(described: tuple[str, list[int]], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """An array by HLO's element type, such as s32, and dimensions."""
    dtype, dims = described
    name = _DTYPES.get(dtype) or {"s": "int", "u": "uint", "f": "float"}[dtype[0]] + dtype[1:]
    return jax.ShapeDtypeStruct(tuple(dims), jnp.dtype(name), sharding=sharding)


def compile_kernels(specification: Path, dump: Path) -> None:
    """Compiles each kernel of a JSON file and writes its bundles to `dump`/<key>.bundles.

    The file: {"topology", "kernels": {key: {"config", "operands", "results"}}}. Operands and
    results are [element type, dims].
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
