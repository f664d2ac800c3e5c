"""What a train step will take on a TPU, as data: memory by kind, seconds by part, FLOPs.

XLA's TPU compiler compiles the program on a machine without a TPU; everything is estimated from
that program. Results are stored on disk, so that the same program is compiled once.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxsft.common.files import write_json
from jaxsft.config import TrainConfig
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.plan.chips import CHIPS, GIB, HBM_LIMIT_BYTES, num_chips
from jaxsft.plan.hlo import parse_program, saved_activation_bytes
from jaxsft.plan.kernels import KernelPrice, price_kernels
from jaxsft.plan.pricing import Chip, PricedOp, price_program
from jaxsft.plan.tpu_aot import (
    Compiled,
    OutOfMemory,
    compile_for_tpu,
    compiler_flags,
    topology_devices,
)
from jaxsft.run.program import abstract_setup, lower_step, num_bytes_per_device, program_hash

# The one measurement with which such estimates can be compared.
CALIBRATION = (
    "Tunix's published run of single_session took 1.095 s a step on a real v5e-8; its step, "
    "compiled and priced like this one but without collectives, comes to 1.05 s (release 0.1.7) "
    "and 1.11 s (development version)."
)
NUM_LARGEST_OPS = 40

# Raise it with every change that changes the estimate of the same program: of the prices, or of the
# names of scopes, which are not part of a program's hash.
PRICING_VERSION = 1


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """One optimizer step on a TPU slice. Bytes are those of one chip, FLOPs those of all chips.

    `hbm_bytes` is by kind. A step that does not fit has no seconds, and `misfit` says why; then
    `hbm_bytes` has only "needed", the compiler's number, or is {} where on-chip memory is too
    small. `compiler_options` come from the environment; the step has none of its own. `parts` are
    seconds by pricing.PARTS and add up to `seconds`. `matmul_flops` includes Pallas kernels, and
    `recomputed_flops` is the part that rematerialisation repeats. `num_positions`: rows × row
    length. `largest_ops` are the ops that take the longest, summed over all their runs.
    """

    topology: str
    num_chips: int
    program_hash: str
    compiler_options: dict[str, str]
    compiler: str
    compile_seconds: float
    num_positions: int
    misfit: str
    hbm_bytes: dict[str, int]
    hbm_limit_bytes: int
    seconds: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unpriced: list[str] = dataclasses.field(default_factory=list)
    assumptions: list[str] = dataclasses.field(default_factory=list)
    matmul_flops: float = 0.0
    recomputed_flops: float = 0.0
    largest_ops: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Does the compiler place the program into the chip's memories?"""
        return not self.misfit

    @property
    def chip(self) -> str:
        """The kind of chip, a key of pricing.CHIPS."""
        return self.topology.split(":")[0]

    @property
    def hbm_total_gib(self) -> float:
        """GiB that the step takes of a chip's memory."""
        return sum(self.hbm_bytes.values()) / GIB

    @property
    def tokens_per_s(self) -> float:
        """Row positions a second, over all chips."""
        return self.num_positions / self.seconds if self.seconds else 0.0


def estimate_step(
    config: TrainConfig,
    model_config: GemmaConfig,
    topology: str,
    steps: int,
    *,
    cache_dir: Path,
    environment: Mapping[str, str],
) -> tuple[StepEstimate, bool]:
    """(the estimate of one step of a run of `steps` steps, did it come from disk); else minutes.

    `environment` is passed to the subprocess that compiles kernels. Raises ValueError for a config
    that the model or the topology cannot run, CompilerError where the compiler fails.
    """
    arguments = abstract_setup(config, model_config, topology_devices(topology), steps)
    lowered = lower_step(arguments)
    argument_bytes = {
        "weights": num_bytes_per_device(arguments.frozen),
        "adapter + optimizer": num_bytes_per_device(arguments.state),
    }
    return estimate_lowered(
        lowered, argument_bytes, config, topology, cache_dir=cache_dir, environment=environment
    )


def estimate_lowered(
    lowered: jax.stages.Lowered,
    argument_bytes: Mapping[str, int],
    config: TrainConfig,
    topology: str,
    *,
    cache_dir: Path,
    environment: Mapping[str, str],
) -> tuple[StepEstimate, bool]:
    """As estimate_step, for a lowered step; `argument_bytes` are those of one chip, by kind."""
    found_hash = program_hash(lowered)
    path = cache_dir / f"{found_hash}-{_cache_key(topology, environment)}.json"
    if (cached := _load(path)) is not None:
        return cached, True
    chip = CHIPS[topology.split(":")[0]]
    started = time.monotonic()
    compiled = compile_for_tpu(lowered)
    known: dict[str, Any] = {
        "topology": topology,
        "num_chips": num_chips(topology),
        "program_hash": found_hash,
        "compiler_options": compiler_flags(environment),
        "compiler": f"libtpu {version('libtpu')}",
        "compile_seconds": time.monotonic() - started,
        "num_positions": config.global_batch_size * config.data.max_length,
        "hbm_limit_bytes": HBM_LIMIT_BYTES[chip.name],
    }
    cache_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(compiled, OutOfMemory):
        estimate = _too_large(compiled, known)
    else:
        kernels = price_kernels(
            compiled.hlo_text, chip, topology, cache_dir / "kernels", environment
        )
        estimate = _price(compiled, chip, kernels, argument_bytes, config, known)
    write_json(path, dataclasses.asdict(estimate))
    return estimate, False


def _too_large(found: OutOfMemory, known: dict[str, Any]) -> StepEstimate:
    needed, available = found.needed_bytes, found.available_bytes
    return StepEstimate(
        **known,
        misfit=f"{needed / GIB:.2f} of {available / GIB:.2f} GiB of {found.memory.upper()}",
        hbm_bytes={"needed": needed} if found.memory == "hbm" else {},
    )


def _price(
    compiled: Compiled,
    chip: Chip,
    kernels: Mapping[str, KernelPrice],
    argument_bytes: Mapping[str, int],
    config: TrainConfig,
    known: dict[str, Any],
) -> StepEstimate:
    priced = price_program(
        compiled.hlo_text,
        chip,
        {name: kernel.seconds for name, kernel in kernels.items()},
        {"loss_head": num_loss_chunks(config, known["num_chips"])},
    )
    in_kernels, recomputed_in_kernels = kernel_flops(priced.ops, kernels)
    assumed = {each for kernel in kernels.values() for each in kernel.assumptions}
    assumed |= {f"one iteration of {loop}" for loop in priced.unknown_loops}
    largest = sorted(priced.ops, key=lambda op: -op.exposed_s)[:NUM_LARGEST_OPS]
    return StepEstimate(
        **known,
        misfit="",
        hbm_bytes=_memory_by_kind(compiled, argument_bytes),
        seconds=priced.seconds,
        parts=priced.parts,
        collectives=[_op_as_dict(op) for op in priced.collectives],
        unpriced=[f"{op.opcode} {op.name} ({op.op_name})" for op in priced.unpriced],
        assumptions=sorted(assumed),
        matmul_flops=(priced.matmul_flops + in_kernels) * known["num_chips"],
        recomputed_flops=(priced.recomputed_matmul_flops + recomputed_in_kernels)
        * known["num_chips"],
        largest_ops=[_op_as_dict(op) for op in largest],
    )


def kernel_flops(ops: Sequence[PricedOp], kernels: Mapping[str, KernelPrice]) -> tuple[int, int]:
    """(matmul FLOPs of all Pallas calls on one chip, the part that rematerialisation repeats)."""
    calls = [op for op in ops if op.name in kernels]
    flops = [kernels[op.name].matmul_flops * op.trips for op in calls]
    again = [n for op, n in zip(calls, flops, strict=True) if op.part == "recomputation"]
    return sum(flops), sum(again)


def _op_as_dict(op: PricedOp) -> dict[str, Any]:
    return {
        "op": op.opcode,
        "part": op.part,
        "name": op.op_name,
        "num_bytes": op.num_bytes,
        "trips": op.trips,
        "in_loop": op.in_loop,
        "seconds": op.seconds,
        "exposed_seconds": op.exposed_s,
    }


def num_loss_chunks(config: TrainConfig, num_chips: int, loss_share: float = 1.0) -> int:
    """Chunks of the loss head that a chip's micro-batch takes, where `loss_share` of its positions,
    0 to 1, bear loss."""
    positions = config.global_batch_size * config.data.max_length
    positions //= config.gradient_accumulation_steps * num_chips
    # Shares come from counts: half of 4096 positions must not become 2049.
    num_loss = math.ceil(loss_share * positions - 1e-6)
    return -(-num_loss // min(config.loss_chunk_tokens, positions))


def _memory_by_kind(compiled: Compiled, argument_bytes: Mapping[str, int]) -> dict[str, int]:
    memory = compiled.memory
    activations = saved_activation_bytes(parse_program(compiled.hlo_text))
    temporaries = memory.peak - memory.arguments - activations
    known = {**argument_bytes, "activations": activations, "temporaries": temporaries}
    return known | {"program, batch": memory.total - sum(known.values())}


def _cache_key(topology: str, environment: Mapping[str, str]) -> str:
    """16 hex digits for everything but the program that an estimate depends on."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    inputs = (PRICING_VERSION, topology, compiler_flags(environment), versions)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _load(path: Path) -> StepEstimate | None:
    """A stored estimate; None where there is none or the file is damaged."""
    try:
        return StepEstimate(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
