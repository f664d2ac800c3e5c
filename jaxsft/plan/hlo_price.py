"""The time of one op of a scheduled TPU program, and the part of the train step it belongs to."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxsft.plan.chips import Chip
from jaxsft.plan.hlo_cost import matmuls
from jaxsft.plan.hlo_text import HBM, VMEM, Computation, Instruction, Program

PARTS = (
    *("attention", "mlp", "lora", "norm", "loss head", "recomputation", "copies"),
    *("collectives", "optimizer", "embedding", "other"),
)
_SCOPES = {
    **{name: name for name in ("attention", "mlp", "lora", "norm", "optimizer", "embedding")},
    "loss_head": "loss head",
}
_RECOMPUTED = "rematted_computation"  # jax.checkpoint's scope for what the backward pass repeats

COLLECTIVES = frozenset(
    {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
)
_COPIES = frozenset({"copy", "slice", "dynamic-slice"})
_MOVES = _COPIES | {
    *("dynamic-update-slice", "transpose", "reshape", "concatenate", "broadcast", "pad"),
    "bitcast-convert",
}
# No work on the chip: names for memory, and what the compiler resolves beforehand.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id"}
    | {"replica-id", "after-all", "opt-barrier", "add-dependency"}
)
_FREE_TARGETS = frozenset({"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"})

# XLA gathers row by row: on v5e 2,048 rows of 1,024 bf16 take 32,663 cycles of its static schedule,
# 2,048 single elements 29,721.
_GATHER_CYCLES_PER_ROW = 16


class PricedOp(NamedTuple):
    """One scheduled op: its price, and its share `exposed_s` of the program's time.

    Seconds and FLOPs are those of all its executions, `trips` of them. Only asynchronous transfers
    take longer than what is exposed of them. `num_bytes` is the array that a transfer moves, once
    (0 for compute); FLOPs are those of matmuls outside Pallas kernels.
    """

    name: str
    opcode: str
    part: str
    op_name: str
    seconds: float
    exposed_s: float
    num_bytes: int = 0
    matmul_flops: int = 0
    recomputed_matmul_flops: int = 0
    trips: int = 1
    in_loop: bool = False

    @property
    def hidden_s(self) -> float:
        """Seconds of a transfer that run beside other ops."""
        return self.seconds - self.exposed_s

    def repeated(self, count: int) -> "PricedOp":
        """The same op in the body of a loop."""
        return self._replace(
            seconds=self.seconds * count,
            exposed_s=self.exposed_s * count,
            matmul_flops=self.matmul_flops * count,
            recomputed_matmul_flops=self.recomputed_matmul_flops * count,
            trips=self.trips * count,
            in_loop=True,
        )


def is_free(computation: Computation, instruction: Instruction) -> bool:
    """No work on the vector units: names for memory, and arithmetic on scalars (tens of cycles)."""
    if instruction.opcode in _FREE or instruction.custom_call_target in _FREE_TARGETS:
        return True
    if instruction.opcode in COLLECTIVES or instruction.estimated_cycles is not None:
        return False
    operands = [array for name in instruction.operands for array in computation[name].arrays]
    return all(math.prod(array.dims) <= 1 for array in (*instruction.arrays, *operands))


def price_op(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    chip: Chip,
    kernel_seconds: Mapping[str, float],
) -> PricedOp | None:
    """The price of one run of an op, or None for one without."""
    if (collective := collective_of(program, computation, instruction)) is not None:
        return _price_collective(program, *collective, instruction.name, chip)
    if instruction.opcode.endswith("-start"):
        return _price_copy(program, computation, instruction, chip)
    if instruction.name in kernel_seconds:
        seconds = kernel_seconds[instruction.name]
    elif instruction.estimated_cycles is not None:
        seconds = instruction.estimated_cycles / chip.clock_hz
    else:
        moved = _move_seconds(computation, instruction, chip) or _gather_seconds(
            program, instruction, chip
        )
        if moved is None:
            return None
        seconds = moved
    found = list(matmuls(program, computation, instruction))
    # A fusion carries the scope of its last op: a residual addition's, say. Its matmul decides.
    main = max(found, key=lambda matmul: matmul[1])[0] if found else instruction
    op_name = main.op_name or instruction.op_name
    return PricedOp(
        name=instruction.name,
        opcode=instruction.opcode,
        part="copies" if _is_move(program, instruction) else _part(op_name),
        op_name=op_name,
        seconds=seconds,
        exposed_s=seconds,
        matmul_flops=sum(flops for _, flops in found),
        recomputed_matmul_flops=sum(
            flops for matmul, flops in found if _RECOMPUTED in _path(matmul.op_name)
        ),
    )


def collective_of(
    program: Program, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
    """The collective that an op runs or starts, and the computation in which it stands.

    It may be the op itself, wrapped in an `async-start`, or inside the fusions by which XLA starts
    and ends one that it runs in pieces beside matmuls (named async-collective-start and -done).
    """
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return computation, instruction
    if instruction.opcode == "async-start" or instruction.name.startswith("async-collective-"):
        inner = program.computations.get(instruction.called("calls"), Computation())
        for child in inner.values():
            if child.opcode in COLLECTIVES:
                return inner, child
    return None


def _price_collective(
    program: Program, computation: Computation, collective: Instruction, name: str, chip: Chip
) -> PricedOp:
    operand_bytes = sum(computation[operand].num_bytes for operand in collective.operands)
    result_bytes = collective.num_bytes
    if collective.opcode.endswith("-start"):  # gives (operands, results, ...), or the results only
        result_bytes -= operand_bytes
    num_bytes = max(operand_bytes, result_bytes)
    opcode = collective.opcode.removesuffix("-start")
    num_chips = program.num_partitions
    group_size = _group_size(collective.attributes, num_chips)
    seconds = collective_seconds(opcode, num_bytes, group_size, num_chips, chip)
    return PricedOp(name, opcode, "collectives", collective.op_name, seconds, seconds, num_bytes)


def collective_seconds(
    opcode: str, num_bytes: int, group_size: int, num_chips: int, chip: Chip
) -> float:
    """Bytes on the busiest link over its bandwidth, for a collective over `group_size` chips.

    `num_bytes` is the whole array: an all-gather's result, a reduce-scatter's operand. In a ring
    of n chips an all-gather or a reduce-scatter passes (n-1)/n of it through every link, an
    all-reduce twice that; an all-to-all sends each of a chip's n pieces n/4 hops on average, a
    collective-permute all of it one hop ("How to Scale Your Model", "Sharded Matrices",
    https://jax-ml.github.io/scaling-book/sharding/). All chips together form a ring in which each
    sends both ways (the compiler agrees: `StrategyRing`); fewer may lie on a line, whose ends have
    one link. Latency, about 1 µs a hop, isn't counted.
    """
    n = group_size
    is_ring = n == num_chips and n > 2 and opcode != "collective-permute"
    crossings = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": n / 4,
        "collective-permute": 1.0,
    }[opcode]
    return num_bytes * crossings / ((2 if is_ring else 1) * chip.link_bytes_per_s)


def _group_size(attributes: str, num_chips: int) -> int:
    """Chips that take part in one collective, from its replica_groups in any of the notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh.group(2)))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed.group(1).count(",") + 1
    return num_chips


def _price_copy(
    program: Program, computation: Computation, start: Instruction, chip: Chip
) -> PricedOp | None:
    """An asynchronous copy between memories: what it moves, once for each end in HBM."""
    opcode = start.opcode.removesuffix("-start")
    if opcode == "async":
        opcode = program.computations[start.called("calls")].root.opcode
    if opcode not in _COPIES:
        return None
    source = computation[start.operands[0]].arrays[0]
    # (result, operand, ...) of a copy, ((operands), result, ...) of the others
    result = start.arrays[0] if start.opcode == "copy-start" else start.arrays[len(start.operands)]
    ends = (source.memory_space, result.memory_space)
    if not set(ends) <= {HBM, VMEM}:
        return None
    num_bytes = result.num_bytes * max(1, ends.count(HBM))
    seconds = num_bytes / chip.hbm_bytes_per_s
    return PricedOp(start.name, opcode, "copies", start.op_name, seconds, seconds, num_bytes)


def _move_seconds(computation: Computation, instruction: Instruction, chip: Chip) -> float | None:
    """A copy, reshape, slice or update without cycles: what it reads and writes, over bandwidth.

    HBM's even for what stays in VMEM: the static schedule of a bf16 reshape of 7.7 M elements to
    (9216, 13, 64) there takes 51,804 cycles on v5e, this 97,000.
    """
    if instruction.opcode not in _MOVES:
        return None
    if instruction.opcode == "dynamic-update-slice":  # in place
        num_bytes = 2 * computation[instruction.operands[1]].num_bytes
    else:
        num_bytes = computation[instruction.operands[0]].num_bytes + instruction.num_bytes
    return num_bytes / chip.hbm_bytes_per_s


def _gather_seconds(program: Program, instruction: Instruction, chip: Chip) -> float | None:
    """Gathers and scatters: the larger of their rows' cycles and their bytes over bandwidth."""
    num_rows = num_bytes = 0
    for inner, gather in _gathers(program, instruction):
        if gather.opcode == "gather":
            rows = gather.arrays[0]
            sizes = re.search(r"slice_sizes=\{([\d,]*)\}", gather.attributes)
            row = [int(size) for size in sizes.group(1).split(",") if size] if sizes else []
        else:
            rows = inner[gather.operands[2]].arrays[0]
            window = re.search(r"update_window_dims=\{([\d,]*)\}", gather.attributes)
            dims = [int(dim) for dim in window.group(1).split(",") if dim] if window else []
            row = [rows.dims[dim] for dim in dims]
        num_rows += math.prod(rows.dims) // math.prod(row)
        # A bf16 row comes with the one that shares its words.
        num_bytes += rows.num_bytes * (3 if rows.dtype == "bf16" else 2)
    if num_rows == 0:
        return None
    return max(num_rows * _GATHER_CYCLES_PER_ROW / chip.clock_hz, num_bytes / chip.hbm_bytes_per_s)


def _gathers(program: Program, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The gathers and scatters in a fusion and the fusions in it, each with its computation."""
    inner = program.computations.get(fusion.called("calls"), Computation())
    for child in inner.values():
        if child.opcode in ("gather", "scatter"):
            yield inner, child
        elif child.opcode == "fusion":
            yield from _gathers(program, child)


def _path(op_name: str) -> list[str]:
    """Scopes, transforms and primitive: jit(f)/jvp(mlp)/dot_general -> jit, f, jvp, mlp, ..."""
    return re.split(r"[/()]+", op_name)


def _part(op_name: str) -> str:
    """The innermost scope that is a part, or recomputation."""
    path = _path(op_name)
    if _RECOMPUTED in path:
        return "recomputation"
    return next((_SCOPES[scope] for scope in reversed(path) if scope in _SCOPES), "other")


def _is_move(program: Program, instruction: Instruction) -> bool:
    """Does an op only move data, at most changing its type?"""
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVES
    inner = program.computations[instruction.called("calls")]
    opcodes = {i.opcode for i in inner.values() if any(array.dims for array in i.arrays)}
    return bool(opcodes & _MOVES) and opcodes <= _MOVES | _FREE | {"convert"}
