"""The time of the Pallas kernels in a compiled TPU program.

HLO says nothing about the time of a Pallas call. Each distinct kernel is compiled alone, in a
subprocess, for its static schedule (module `llo_schedule`), which is cached. A kernel costs the
larger of the schedule's cycles over the clock and its DMAs' bytes over HBM bandwidth. Operands
stand in the memory (HBM or VMEM) where the program has them; prefetched operands that are constants
of the program decide how often conditional regions run. Waits of single DMAs, the first and last
ones of a grid for instance, are not modelled.
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

from jaxsft.common.files import whole_file
from jaxsft.plan.hlo_text import (
    HBM,
    VMEM,
    Array,
    Computation,
    Instruction,
    Program,
    parse_program,
)
from jaxsft.plan.hlo_values import Callers, constant_words
from jaxsft.plan.llo_schedule import schedule
from jaxsft.plan.pricing import Chip
from jaxsft.plan.tpu_aot import CompilerError, compiler_flags, one_line

_WORKER = (
    "import pathlib, sys; from jaxsft.plan.kernel_worker import compile_kernels; "
    "compile_kernels(*map(pathlib.Path, sys.argv[1:]))"
)


class KernelCall(NamedTuple):
    """A Pallas call. `words`: contents of the constant operands, by index, as 32-bit words."""

    name: str
    config: str  # the custom call's backend_config, JSON
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    words: dict[int, list[int]]


class KernelPrice(NamedTuple):
    """One run of a Pallas call: `seconds` is the larger of the schedule's and the bytes' time."""

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
    # Where the program has the operands and results: the compiler may keep them in VMEM.
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
        hlo_text: `tpu_aot.Compiled.hlo_text`: with the constants that `as_text()` leaves out.
        chip: what the program was compiled for.
        topology: its name, as for `tpu_aot.topology_devices`.
        cache_dir: where the schedules of kernels are kept, compressed, some 100 KB each.
        environment: environment variables of the subprocess, with those of
            `tpu_aot.AOT_ENVIRONMENT`.

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
    """Compile kernels in a subprocess and keep their bundles in `cache_dir`.

    Raises CompilerError with the end of the subprocess's messages when it fails.
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
