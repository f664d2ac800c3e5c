"""Compiling for TPUs that this machine doesn't have, with XLA's own TPU compiler from libtpu.

libtpu reads its environment when it is loaded, at the first topology: a command applies
AOT_ENVIRONMENT before that. JAX_PLATFORMS, which JAX reads when it is imported, is `jax_platforms`
afterwards. Nothing here runs on a device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jaxlib._hlo import HloPrintOptions  # no public module has it

from jaxsft.common.out_of_memory import Shortage, parse_shortage
from jaxsft.plan.chips import TOPOLOGIES

# A process without a TPU: don't look for one, and share libtpu with other such processes. The
# accelerator type only has to be a valid one, the topology decides what is compiled for.
AOT_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


class CompilerError(Exception):
    """The compiler failed otherwise than for want of memory; one line says how."""


class ProgramMemory(NamedTuple):
    """Bytes of HBM on each chip. `peak` is what is alive at the fullest moment, arguments and all;
    it is also what the compiler holds against the chip's memory."""

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
    """A program that doesn't fit: the memory that is too small, and bytes, as the compiler says."""

    memory: str  # "hbm" or "vmem"
    needed_bytes: int
    available_bytes: int


def compiler_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """The flags that XLA reads from an environment: what it makes of a program depends on them."""
    names = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    return {name: environment[name] for name in names if environment.get(name)}


def topology_devices(topology: str) -> list[Any]:
    """Devices of a topology such as "v5e:2x4", for a Mesh: 8 handles, to compile for only.

    Raises ValueError for a name that isn't in TOPOLOGIES.
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
    """Compile what was lowered on a mesh of `topology_devices`; takes minutes for a large model.

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
    """Compile for whatever it was lowered for; `compiler` is its name in a CompilerError, which is
    raised where it fails otherwise than for want of memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (too_large := parse_out_of_memory(str(error))) is None:
            raise CompilerError(f"{compiler} failed: {one_line(str(error))}") from error
        return too_large


def one_line(message: str) -> str:
    """A compiler's message, which may show whole programs, cut to what a person reads."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:300]} …"


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """The bytes in a compiler's RESOURCE_EXHAUSTED error, or None where it is something else."""
    match parse_shortage(message):
        case Shortage(str(memory), int(needed), int(available)):
            return OutOfMemory(memory, needed, available)
    return None


def _scheduled_text(compiled: jax.stages.Compiled) -> str:
    """`compiled.as_text()` with the constants that it leaves out: the kernels' block masks."""
    executable = compiled.runtime_executable()
    assert executable is not None
    (module,) = executable.hlo_modules()
    options = HloPrintOptions()
    options.print_large_constants = True
    return module.to_string(options)
