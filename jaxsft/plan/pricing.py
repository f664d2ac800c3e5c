"""The estimated time of a compiled TPU program: every op priced, or listed as unpriced.

- Fusions, convolutions, synchronous copies: the compiler's `estimated_cycles` over the clock.
- Pallas kernels: seconds from the caller (module `kernels`), from their static schedules.
- Gathers, scatters, and copies without cycles: bytes over HBM bandwidth, or more for many rows.
- Asynchronous copies (`copy-start`, `slice-start`): bytes at their ends in HBM over HBM bandwidth.
- Collectives: bytes over the busiest link, by ring algorithms (`collective_seconds`).

An asynchronous transfer runs beside the ops between its start and its end. There are two channels,
HBM and interconnect; each runs one transfer at a time, in the order of the starts. The time that no
op covers is *exposed*. The program's time is the time of all compute ops plus all exposed time. A
copy and the ops beside it share HBM bandwidth; that is not modelled.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxsft.plan.chips import Chip
from jaxsft.plan.hlo import (
    HBM,
    VMEM,
    Callers,
    Computation,
    Instruction,
    Program,
    parse_program,
    static_trip_count,
)

# --- the matmul FLOPs of an instruction ---


def matmuls(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, int]]:
    """The dots and convolutions of an instruction or of its fusion, each with its FLOPs."""
    for inner, child in _unfused(program, computation, instruction):
        if child.opcode in ("dot", "convolution"):
            yield child, _matmul_flops(inner, child)


def _unfused(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction, or those in its fusion and the fusions in it, each with its computation."""
    if instruction.opcode != "fusion":
        yield computation, instruction
        return
    inner = program.computations[instruction.called("calls")]
    for child in inner.values():
        yield from _unfused(program, inner, child)


_PLAIN_WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def _matmul_flops(computation: Computation, instruction: Instruction) -> int:
    """2 × output elements × contracted elements.

    The TPU compiler writes a dot as a convolution, its batch dimensions as dilated spatial ones.
    Only window positions on input elements count, as in XLA's cost analysis.
    """
    lhs, rhs = (computation[operand].arrays[0].dims for operand in instruction.operands[:2])
    output = instruction.arrays[0].dims
    if instruction.opcode == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2 * math.prod(output) * math.prod(lhs[dim] for dim in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    lhs_labels, rhs_labels, output_labels = labels.groups()
    flops = 2 * output[output_labels.index("b")] * output[output_labels.index("f")]
    flops *= rhs[rhs_labels.index("i")]  # per feature group
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    for index in range(len(fields["size"].split("x")) if fields else 0):
        size, out = lhs[lhs_labels.index(str(index))], output[output_labels.index(str(index))]
        given = {name: int(text.split("x")[index].split("_")[0]) for name, text in fields.items()}
        flops *= _valid_positions(size, out, _PLAIN_WINDOW | given)
    return flops


def _valid_positions(input_size: int, output_size: int, window: Mapping[str, int]) -> int:
    """Pairs of an output and a window position that meet an input element, not padding."""
    dilation = window["lhs_dilate"]
    starts = np.arange(output_size)[:, None] * window["stride"] - window["pad"]
    position = starts + np.arange(window["size"])[None, :] * window["rhs_dilate"]
    inside = (position >= 0) & (position < (input_size - 1) * dilation + 1)
    return int(np.count_nonzero(inside & (position % dilation == 0)))


# --- the time of an op ---

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
_COPIES = {"copy", "slice", "dynamic-slice"}
_MOVES = _COPIES | {"dynamic-update-slice", "transpose", "reshape", "concatenate"}
_MOVES |= {"broadcast", "pad", "bitcast-convert"}
# No work on the chip: these name memory, or the compiler resolves them beforehand.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id"}
_FREE |= {"replica-id", "after-all", "opt-barrier", "add-dependency"}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}

# XLA gathers row by row. On v5e its static schedule takes 32,663 cycles for 2,048 rows of 1,024
# bf16, and 29,721 cycles for 2,048 single elements.
_GATHER_CYCLES_PER_ROW = 16


class PricedOp(NamedTuple):
    """One scheduled op and its price; seconds and FLOPs are sums over all its runs, `trips`.

    `exposed_s` is what the op adds to the program's time: all its seconds, except where it is an
    asynchronous transfer. `num_bytes` is the size of the array that a transfer moves, once (0 for
    compute). FLOPs are those of matmuls outside Pallas kernels.
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


def _is_free(computation: Computation, instruction: Instruction) -> bool:
    """Does an op only name memory, or compute with scalars, which takes tens of cycles?"""
    if instruction.opcode in _FREE or instruction.custom_call_target in _FREE_TARGETS:
        return True
    if instruction.opcode in COLLECTIVES or instruction.estimated_cycles is not None:
        return False
    operands = [array for name in instruction.operands for array in computation[name].arrays]
    return all(math.prod(array.dims) <= 1 for array in (*instruction.arrays, *operands))


class _Context(NamedTuple):
    program: Program
    chip: Chip
    kernel_seconds: Mapping[str, float]
    loop_trip_counts: Mapping[str, int]


def _price_op(
    context: _Context, computation: Computation, instruction: Instruction
) -> PricedOp | None:
    """The price of one run of an op; None for an op without a price."""
    program, chip = context.program, context.chip
    if (collective := _collective_of(program, computation, instruction)) is not None:
        return _price_collective(program, *collective, instruction.name, chip)
    if instruction.opcode.endswith("-start"):
        return _price_copy(program, computation, instruction, chip)
    seconds: float | None
    if instruction.name in context.kernel_seconds:
        seconds = context.kernel_seconds[instruction.name]
    elif instruction.estimated_cycles is not None:
        seconds = instruction.estimated_cycles / chip.clock_hz
    else:
        seconds = _move_seconds(computation, instruction, chip)
        seconds = seconds or _gather_seconds(program, computation, instruction, chip)
    if seconds is None:
        return None
    found = list(matmuls(program, computation, instruction))
    # A fusion has the scope of its last op, a residual addition for instance: its matmul decides.
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


def _collective_of(
    program: Program, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
    """The collective that an op runs or starts, after the computation in which it stands.

    It is the op itself, or the body of an `async-start`. XLA also runs collectives in pieces beside
    matmuls; then it stands in fusions named async-collective-start and async-collective-done.
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
    opcode, num_chips = collective.opcode.removesuffix("-start"), program.num_partitions
    group_size = _group_size(collective.attributes, num_chips)
    seconds = collective_seconds(opcode, num_bytes, group_size, num_chips, chip)
    return PricedOp(name, opcode, "collectives", collective.op_name, seconds, seconds, num_bytes)


def collective_seconds(
    opcode: str, num_bytes: int, group_size: int, num_chips: int, chip: Chip
) -> float:
    """Bytes on the busiest link over its bandwidth, for a collective over `group_size` chips.

    `num_bytes` is the whole array: an all-gather's result, a reduce-scatter's operand. In a ring
    of n chips an all-gather or a reduce-scatter passes (n-1)/n of it through every link, and an
    all-reduce twice that. An all-to-all sends each of a chip's n pieces n/4 hops on average, a
    collective-permute all of it one hop ("How to Scale Your Model", "Sharded Matrices",
    https://jax-ml.github.io/scaling-book/sharding/). All chips together form a ring in which each
    sends both ways, as the compiler's `StrategyRing` does. Fewer chips may lie on a line, whose
    ends have one link. Latency, about 1 µs a hop, is not counted.
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
    """Chips that take part in one collective, from any of the notations of replica_groups."""
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
    """An asynchronous copy between memories: its bytes count once for each end in HBM."""
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
    """A copy, reshape, slice or update without cycles: bytes read and written over HBM bandwidth.

    Arrays in VMEM cost the same here. A bf16 reshape of 7.7 M elements to (9216, 13, 64) in VMEM
    takes 51,804 cycles on v5e by its static schedule, 97,000 by this.
    """
    if instruction.opcode not in _MOVES:
        return None
    if instruction.opcode == "dynamic-update-slice":  # in place
        num_bytes = 2 * computation[instruction.operands[1]].num_bytes
    else:
        num_bytes = computation[instruction.operands[0]].num_bytes + instruction.num_bytes
    return num_bytes / chip.hbm_bytes_per_s


def _gather_seconds(
    program: Program, computation: Computation, instruction: Instruction, chip: Chip
) -> float | None:
    """The gathers and scatters in a fusion: rows × cycles, or bytes over bandwidth if larger."""
    if instruction.opcode != "fusion":
        return None
    num_rows = num_bytes = 0
    for inner, gather in _unfused(program, computation, instruction):
        if gather.opcode == "gather":
            rows = gather.arrays[0]
            row = gather.numbers("slice_sizes")
        elif gather.opcode == "scatter":
            rows = inner[gather.operands[2]].arrays[0]
            row = [rows.dims[dim] for dim in gather.numbers("update_window_dims")]
        else:
            continue
        num_rows += math.prod(rows.dims) // math.prod(row)
        # A bf16 row is read together with the row that shares its words.
        num_bytes += rows.num_bytes * (3 if rows.dtype == "bf16" else 2)
    if num_rows == 0:
        return None
    return max(num_rows * _GATHER_CYCLES_PER_ROW / chip.clock_hz, num_bytes / chip.hbm_bytes_per_s)


def _path(op_name: str) -> list[str]:
    """Scopes, transforms and primitive: jit(f)/jvp(mlp)/dot_general gives jit, f, jvp, mlp, …"""
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


# --- the time of a program ---


class Priced(NamedTuple):
    """The estimate of a program. A loop of unknown length counts once.

    `unpriced` ops take no time here; their `num_bytes` is that of the result, once.
    """

    ops: list[PricedOp]
    unpriced: list[PricedOp]
    unknown_loops: list[str]

    @property
    def seconds(self) -> float:
        """The program's time on a chip."""
        return sum(op.exposed_s for op in self.ops)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part, all of PARTS; they add up to `seconds`."""
        return {part: sum(op.exposed_s for op in self.ops if op.part == part) for part in PARTS}

    @property
    def collectives(self) -> list[PricedOp]:
        """The ops that use the interconnect."""
        return [op for op in self.ops if op.opcode in COLLECTIVES]

    @property
    def matmul_flops(self) -> int:
        """FLOPs of one chip's matmuls outside Pallas kernels."""
        return sum(op.matmul_flops for op in self.ops)

    @property
    def recomputed_matmul_flops(self) -> int:
        """Those of them that the backward pass repeats."""
        return sum(op.recomputed_matmul_flops for op in self.ops)

    def add(self, called: "Priced") -> None:
        """Appends the ops of another computation."""
        self.ops.extend(called.ops)
        self.unpriced.extend(called.unpriced)
        self.unknown_loops.extend(called.unknown_loops)

    def add_loop(self, body: "Priced", count: int) -> None:
        """Appends `count` iterations of a loop."""
        ops, unpriced = ([op.repeated(count) for op in each] for each in (body.ops, body.unpriced))
        self.add(Priced(ops, unpriced, body.unknown_loops))


def price_program(
    hlo_text: str,
    chip: Chip,
    kernel_seconds: Mapping[str, float],
    loop_trip_counts: Mapping[str, int],
) -> Priced:
    """Estimates the time of one run of a scheduled program on one of its chips.

    Args:
        hlo_text: `compiled.as_text()`.
        chip: an entry of CHIPS.
        kernel_seconds: seconds of one run of each Pallas call, by instruction name.
        loop_trip_counts: iterations of the loops that depend on data, by scope (a part of the
            loop's op_name). The first scope that matches counts.
    """
    program = parse_program(hlo_text)
    return _price(_Context(program, chip, kernel_seconds, loop_trip_counts), program.entry, ())


def _price(context: _Context, name: str, callers: Callers) -> Priced:
    """Prices one run of the computation `name`; `callers` are the loops around it."""
    computation = context.program.computations[name]
    priced = Priced([], [], [])
    now_s = 0.0
    channel_free_s = {"hbm": 0.0, "link": 0.0}
    in_flight: dict[str, tuple[PricedOp, float]] = {}  # (transfer, its end), by `_phase`'s key
    for instruction in computation.values():
        if instruction.opcode in ("while", "call", "conditional"):
            called = _price_called(context, computation, instruction, callers)
            priced.add(called)
            now_s += called.seconds
            continue
        phase, key = _phase(context.program, computation, instruction)
        if phase == "done":
            if key in in_flight:
                op, end_s = in_flight.pop(key)
                exposed_s = max(0.0, end_s - now_s)
                priced.ops.append(op._replace(exposed_s=exposed_s))
                now_s += exposed_s
        elif not _is_free(computation, instruction):
            price = _price_op(context, computation, instruction)
            if price is None:
                name, opcode, op_name = instruction.name, instruction.opcode, instruction.op_name
                size = instruction.num_bytes
                priced.unpriced.append(PricedOp(name, opcode, "other", op_name, 0.0, 0.0, size))
            elif phase == "start":
                channel = "link" if price.opcode in COLLECTIVES else "hbm"
                end_s = max(now_s, channel_free_s[channel]) + price.seconds
                channel_free_s[channel] = end_s
                in_flight[key] = price, end_s
            else:
                priced.ops.append(price)
                now_s += price.seconds
    priced.ops.extend(op for op, _ in in_flight.values())  # no op waits for them: all exposed
    return priced


def _phase(program: Program, computation: Computation, instruction: Instruction) -> tuple[str, str]:
    """("start" or "done" of a transfer, the transfer's key); two empty texts for other ops."""
    if instruction.opcode.endswith("-start"):
        return "start", instruction.name
    if instruction.opcode.endswith("-done"):
        return "done", instruction.operands[0]
    found = _collective_of(program, computation, instruction)
    if instruction.opcode != "fusion" or found is None:
        return "", ""
    channel = re.search(r"channel_id=\d+", found[1].attributes)
    phase = "start" if instruction.name.startswith("async-collective-start") else "done"
    return phase, channel.group() if channel else ""


def _price_called(
    context: _Context, computation: Computation, instruction: Instruction, callers: Callers
) -> Priced:
    """Prices a call, the slowest branch of a conditional, or all iterations of a loop."""
    if instruction.opcode == "call":
        return _price(context, instruction.called("to_apply"), callers)
    if instruction.opcode == "conditional":
        branches = [_price(context, branch, callers) for branch in instruction.branches]
        return max(branches, key=lambda branch: branch.seconds)
    inside = (*callers, (computation, instruction))
    count = static_trip_count(context.program, instruction, inside)
    priced = Priced([], [], [])
    if count is None:
        counts, op_name = context.loop_trip_counts, instruction.op_name
        count = next((counts[scope] for scope in counts if scope in op_name), None)
    if count is None:
        count = 1
        priced.unknown_loops.append(f"{instruction.name} ({instruction.op_name})")
    priced.add_loop(_price(context, instruction.called("condition"), inside), count + 1)
    priced.add_loop(_price(context, instruction.called("body"), inside), count)
    return priced
