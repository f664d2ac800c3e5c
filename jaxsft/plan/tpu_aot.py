"""Compiles for TPUs that this machine does not have, with XLA's own TPU compiler from libtpu.

libtpu reads its environment when it is loaded, at the first topology; a command sets
AOT_ENVIRONMENT before that. JAX reads JAX_PLATFORMS when it is imported; after that the option
`jax_platforms` does the same. Nothing here runs on a device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jaxlib._hlo import HloPrintOptions  # no public module has it

from jaxsft.common.out_of_memory import Shortage, parse_shortage
from jaxsft.plan.chips import TOPOLOGIES

# For a process without a TPU: do not look for one, and share libtpu with other such processes. Any
# valid accelerator type will do; the topology decides for which TPU a program is compiled.
AOT_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


class CompilerError(Exception):
    """The compiler failed, and not because memory is too small; one line says how."""


class ProgramMemory(NamedTuple):
    """Bytes of HBM on each chip. `peak` is the most that is in use at one time, with arguments; the
    compiler compares it with the chip's memory."""

    arguments: int
    peak: int
    code: int

    @property
    def total(self) -> int:
        """Bytes that the program needs of a chip's memory."""
        return self.peak + self.code


class Compiled(NamedTuple):
    """A program that fits: its scheduled HLO with all constants, and its memory."""

    hlo_text: str
    memory: ProgramMemory


class OutOfMemory(NamedTuple):
    """A program that does not fit: which memory is too small, and bytes as the compiler reports."""

    memory: str  # "hbm" or "vmem"
    needed_bytes: int
    available_bytes: int


def compiler_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """The flags that XLA reads from an environment; the compiled program depends on them."""
    names = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    return {name: environment[name] for name in names if environment.get(name)}


def topology_devices(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:2x4" (8), for a Mesh; programs can only be compiled.

    Raises ValueError for a name that is not in TOPOLOGIES.
    """
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology {topology!r} is not one of {', '.join(TOPOLOGIES)}")
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name="default",
        chips_per_host_bounds=TOPOLOGIES[topology],
        num_slices=1,
    )
    return list(description.devices)


def compile_for_tpu(lowered: jax.stages.Lowered) -> Compiled | OutOfMemory:
    """Compiles a program lowered on a mesh of `topology_devices`; minutes for a large model.

    Raises CompilerError where the compiler fails.
    """
    compiled = compile_or_refuse(lowered, "the TPU compiler")
    if isinstance(compiled, OutOfMemory):
        return compiled
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return Compiled(
        hlo_text=_scheduled_text(compiled),
        memory=ProgramMemory(
            arguments=analysis.argument_size_in_bytes,
            # Not temp_size_in_bytes: 18.5 GiB where the heap, as dumped, is 13.5 and the peak 13.3.
            peak=analysis.peak_memory_in_bytes,
            code=analysis.generated_code_size_in_bytes,
        ),
    )


def compile_or_refuse(
    lowered: jax.stages.Lowered, compiler: str
) -> jax.stages.Compiled | OutOfMemory:
    """Compiles a lowered program; OutOfMemory where it needs too much memory.

    Raises CompilerError, with the name `compiler`, for any other failure.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (too_large := parse_out_of_memory(str(error))) is None:
            raise CompilerError(f"{compiler} failed: {one_line(str(error))}") from error
        return too_large


def one_line(message: str) -> str:
    """A compiler's message, which may contain whole programs, cut to 300 characters."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:300]} …"


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """The bytes in a compiler's RESOURCE_EXHAUSTED error; None for another error."""
    match parse_shortage(message):
        case Shortage(str(memory), int(needed), int(available)):
            return OutOfMemory(memory, needed, available)
    return None


def _scheduled_text(compiled: jax.stages.Compiled) -> str:
    """`compiled.as_text()` with large constants, which it leaves out: the kernels' block masks."""
    executable = compiled.runtime_executable()
    assert executable is not None
    (module,) = executable.hlo_modules()
    options = HloPrintOptions()
    options.print_large_constants = True
    return module.to_string(options)
