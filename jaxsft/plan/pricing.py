"""The estimated time of a compiled TPU program: every op priced, or listed as unpriced.

- Fusions, convolutions, synchronous copies: the compiler's `estimated_cycles` over the clock.
- Pallas kernels: seconds from the caller (module `kernel_price`), from their static schedules.
- Gathers, scatters, and copies without cycles: bytes over HBM bandwidth, or more for many rows.
- Asynchronous copies (`copy-start`, `slice-start`): bytes at their ends in HBM over HBM bandwidth.
- Collectives: bytes over the busiest link, by ring algorithms (`hlo_price.collective_seconds`).

Asynchronous transfers run beside the ops scheduled between their start and their end, one at a time
in the order of their starts on each of two channels, HBM and interconnect; what the ops don't cover
is *exposed*. That a copy and the ops beside it share HBM bandwidth isn't modelled. The program's
time is that of all compute ops plus all that is exposed.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxsft.plan.chips import Chip
from jaxsft.plan.hlo_price import COLLECTIVES, PARTS, PricedOp, collective_of, is_free, price_op
from jaxsft.plan.hlo_text import Computation, Instruction, Program, parse_program
from jaxsft.plan.hlo_values import Callers, static_trip_count


class Unpriced(NamedTuple):
    """An op without a price, how often it runs, and the bytes of its result, once."""

    name: str
    opcode: str
    op_name: str
    num_bytes: int
    trips: int = 1


class Priced(NamedTuple):
    """The estimate of a program. Loops whose trip count nobody knows are counted once."""

    ops: list[PricedOp]
    unpriced: list[Unpriced]
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
        """The ops that use the interconnect; what hides of them is `hidden_s`."""
        return [op for op in self.ops if op.opcode in COLLECTIVES]

    @property
    def matmul_flops(self) -> int:
        """FLOPs of one chip's matmuls outside Pallas kernels."""
        return sum(op.matmul_flops for op in self.ops)

    @property
    def recomputed_matmul_flops(self) -> int:
        """Those of them that the backward pass repeats."""
        return sum(op.recomputed_matmul_flops for op in self.ops)

    def add_loop(self, body: "Priced", count: int) -> None:
        """Append `count` iterations of a loop."""
        self.ops.extend(op.repeated(count) for op in body.ops)
        self.unpriced.extend(op._replace(trips=op.trips * count) for op in body.unpriced)
        self.unknown_loops.extend(body.unknown_loops)

    def add(self, called: "Priced") -> None:
        """Append what another computation does."""
        self.ops.extend(called.ops)
        self.unpriced.extend(called.unpriced)
        self.unknown_loops.extend(called.unknown_loops)


class _Context(NamedTuple):
    program: Program
    chip: Chip
    kernel_seconds: Mapping[str, float]
    loop_trip_counts: Mapping[str, int]


def price_program(
    hlo_text: str,
    chip: Chip,
    kernel_seconds: Mapping[str, float],
    loop_trip_counts: Mapping[str, int],
) -> Priced:
    """Estimate the time of one run of a scheduled program on one of its chips.

    Args:
        hlo_text: `compiled.as_text()`.
        chip: an entry of CHIPS.
        kernel_seconds: seconds of one run of each Pallas call, by instruction name.
        loop_trip_counts: iterations of the loops that depend on data, by a scope, that is, a part
            of the loop's op_name; the first that matches counts.
    """
    program = parse_program(hlo_text)
    return _price(_Context(program, chip, kernel_seconds, loop_trip_counts), program.entry, ())


def _price(context: _Context, name: str, callers: Callers) -> Priced:
    """Price one run of the computation `name`; `callers` are the loops around it."""
    computation = context.program.computations[name]
    priced = Priced([], [], [])
    now_s = 0.0
    channel_free_s = {"hbm": 0.0, "link": 0.0}
    in_flight: dict[str, tuple[PricedOp, float]] = {}  # by what ends it, with its end time
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
        elif not is_free(computation, instruction):
            price = price_op(
                context.program, computation, instruction, context.chip, context.kernel_seconds
            )
            if price is None:
                priced.unpriced.append(
                    Unpriced(
                        instruction.name,
                        instruction.opcode,
                        instruction.op_name,
                        instruction.num_bytes,
                    )
                )
            elif phase == "start":
                channel = "link" if price.opcode in COLLECTIVES else "hbm"
                end_s = max(now_s, channel_free_s[channel]) + price.seconds
                channel_free_s[channel] = end_s
                in_flight[key] = price, end_s
            else:
                priced.ops.append(price)
                now_s += price.seconds
    priced.ops.extend(op for op, _ in in_flight.values())  # nothing waits for them here: exposed
    return priced


def _phase(program: Program, computation: Computation, instruction: Instruction) -> tuple[str, str]:
    """Whether an op is the start or the end ("done") of a transfer, and of which one."""
    if instruction.opcode.endswith("-start"):
        return "start", instruction.name
    if instruction.opcode.endswith("-done"):
        return "done", instruction.operands[0]
    if instruction.opcode == "fusion":
        found = collective_of(program, computation, instruction)
        if found is not None:
            channel = re.search(r"channel_id=\d+", found[1].attributes)
            phase = "start" if instruction.name.startswith("async-collective-start") else "done"
            return phase, channel.group() if channel else ""
    return "", ""


def _price_called(
    context: _Context, computation: Computation, instruction: Instruction, callers: Callers
) -> Priced:
    """Price a call, the dearest branch of a conditional, or a loop with all its iterations."""
    if instruction.opcode == "call":
        return _price(context, instruction.called("to_apply"), callers)
    if instruction.opcode == "conditional":
        branches = [_price(context, branch, callers) for branch in instruction.branches]
        return max(branches, key=lambda branch: branch.seconds)
    inside = (*callers, (computation, instruction))
    count = static_trip_count(context.program, instruction, inside)
    priced = Priced([], [], [])
    if count is None:
        given = (n for scope, n in context.loop_trip_counts.items() if scope in instruction.op_name)
        count = next(given, None)
    if count is None:
        count = 1
        priced.unknown_loops.append(f"{instruction.name} ({instruction.op_name})")
    priced.add_loop(_price(context, instruction.called("condition"), inside), count + 1)
    priced.add_loop(_price(context, instruction.called("body"), inside), count)
    return priced
