"""The static schedule of a TPU kernel: how many cycles its bundles take, how many bytes it moves.

libtpu writes a kernel's final program ("...final_bundles.txt") as VLIW bundles, one a cycle, with
the loops, branches and DMAs of the kernel and of Pallas' pipeline around it. How often a bundle
runs hangs on scalar code only: grid counters, `pl.when`, block indices from prefetched arrays. So
this runs that scalar code, skips all vector instructions, and counts.

Bundles with a `vmatmul` wait for their matrix unit, which takes a row of its left-hand side a cycle
(two on v6e): that is what makes up the chip's peak, and the scheduler packs them closer. Checked
on v5e against XLA's own estimates of its matmuls: 1,070,965 cycles here and 1,083,068 there for
4096 × 4096 × 4096, whose ideal is 1,048,576; for smaller ones 0.73 to 1.13 of its estimate. Not in
it: waiting for DMAs, so the caller also compares bytes with bandwidth.

What isn't known is assumed to happen: a branch around a region isn't taken, a DMA is issued; a loop
without a known end runs once. `Schedule.assumptions` lists such places.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxsft.plan.llo_text import Block, Instruction, parse_blocks

# DMA sizes are in granules: a bf16 (256, 256) window is 4096 of them.
_GRANULE_BYTES = 32
_MAX_STEPS = 20_000_000


class Schedule(NamedTuple):
    """What one run of a kernel costs, and what had to be assumed about it."""

    cycles: int
    hbm_bytes: int
    mxu_rows: int  # rows that all matrix units took
    assumptions: tuple[str, ...]


class _Pointer(NamedTuple):
    """An address: a buffer (an allocation, or an operand of the kernel) and a word offset."""

    buffer: str
    offset: int


_Value = int | bool | _Pointer | None  # None: not known


def schedule(
    final_bundles: str, mxu_rows_per_cycle: int, operands: Mapping[int, Sequence[int]]
) -> Schedule:
    """Run the scalar code of a kernel and count.

    Args:
        final_bundles: the text of the dump.
        mxu_rows_per_cycle: rows of a left-hand side that one matrix unit takes in a cycle.
        operands: the 32-bit words of the operands whose contents are known, by index: prefetched
            block indices and masks.
    """
    blocks = parse_blocks(final_bundles, mxu_rows_per_cycle)
    machine = _Machine({f"operand{index}": list(words) for index, words in operands.items()})
    position = 0
    order = list(blocks)
    index_of = {start: index for index, start in enumerate(order)}
    runs: Counter[int] = Counter()
    for _ in range(_MAX_STEPS):
        block = blocks[order[position]]
        runs[block.start] += 1
        machine.run(block.instructions)
        position += 1
        if block.target is not None and machine.branches(block):
            position = index_of[block.target]
        if position == len(order):
            break
    else:
        raise ValueError(f"a kernel ran for more than {_MAX_STEPS} blocks of instructions")
    return Schedule(
        cycles=sum(blocks[start].cycles * count for start, count in runs.items()),
        hbm_bytes=machine.hbm_bytes,
        mxu_rows=sum(blocks[start].mxu_rows * count for start, count in runs.items()),
        assumptions=tuple(sorted(machine.assumptions)),
    )


def _wrap(value: int) -> int:
    """As a signed 32-bit number."""
    return (value + 2**31) % 2**32 - 2**31


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << (b % 32),
    "sshrl": lambda a, b: (a % 2**32) >> (b % 32),
    "sshra": lambda a, b: a >> (b % 32),
    "smin": min,
    "smax": max,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


class _Machine:
    """Scalar registers and memory. A register is written under a new name each time (SSA)."""

    def __init__(self, memory: dict[str, list[int]]):
        self.memory: dict[str, dict[int, _Value]] = {
            buffer: {index: _wrap(word) for index, word in enumerate(words)}
            for buffer, words in memory.items()
        }
        self.registers: dict[str, tuple[_Value, int]] = {}  # value and when it was written
        self.time = 0
        self.hbm_bytes = 0
        self.assumptions: set[str] = set()

    def run(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            self.time += 1
            holds = self.read(instruction.predicate) if instruction.predicate else True
            if instruction.opcode == "sst":
                self.store(instruction, holds)
            elif instruction.opcode.startswith("dma."):
                if instruction.opcode != "dma.done.wait":
                    self.transfer(instruction, holds)
            else:
                value = self.evaluate(instruction)
                if holds is not True and instruction.otherwise:
                    other = self.read(instruction.otherwise)
                    value = other if holds is False or value == other else None
                elif holds is False:
                    continue
                self.registers[instruction.result] = value, self.time

    def branches(self, block: Block) -> bool:
        """Is the branch at the end of the block taken?"""
        taken = self.read(block.predicate) if block.predicate else True
        if taken is None:
            assert block.target is not None
            backward = block.target <= block.start
            what = "a loop runs once" if backward else "a conditional region always runs"
            self.assumptions.add(f"{what} (bundle {block.start:#x})")
        return taken is True

    def read(self, operand: str) -> _Value:
        """A literal, an allocation, a register, or a negated predicate register."""
        if operand.startswith("!"):
            value = self.read(operand[1:])
            return None if value is None else not value
        if operand.startswith("%"):
            return self.registers.get(operand[1:], (None, 0))[0]
        if operand.startswith("["):
            return self.address(operand)
        try:
            return _wrap(int(operand, 0))
        except ValueError:
            return None

    def address(self, operand: str) -> _Pointer | None:
        """[smem:[#allocation3 + %s12 + $0x1]]: a sum of a buffer, or a register, and offsets."""
        buffer, offset = "", 0
        for term in operand.replace("smem:", "").strip("[]").split(" + "):
            value = self.read(term.removeprefix("$")) if term[0] in "%$" else None
            if term.startswith("#"):
                buffer = term
            elif isinstance(value, _Pointer):
                buffer, offset = value.buffer, offset + value.offset
            elif isinstance(value, int):
                offset += value
            else:
                return None
        return _Pointer(buffer, offset)

    def evaluate(self, instruction: Instruction) -> _Value:
        opcode, _, kind = instruction.opcode.partition(".")
        if opcode == "inlined_call_operand":
            return _Pointer(f"operand{instruction.operands[0]}", 0)
        if opcode == "sphi":  # the operand of the edge on which control came
            candidates = [self.registers.get(name[1:], (None, -1)) for name in instruction.operands]
            return max(candidates, key=lambda candidate: candidate[1])[0]
        if opcode == "sld":
            pointer = self.address(instruction.operands[0])
            return (
                None if pointer is None else self.memory.get(pointer.buffer, {}).get(pointer.offset)
            )
        values = [self.read(operand) for operand in instruction.operands]
        if opcode in ("smov", "int_to_ptr"):
            return values[0]
        if opcode == "scalar_select":
            predicate, on_true, on_false = values
            if predicate is None:
                return on_true if on_true == on_false else None
            return on_true if predicate else on_false
        if opcode in ("por", "pand", "pnor", "pnand", "pxor", "pneg"):
            return _logic(opcode, values)
        pointer = next((value for value in values if isinstance(value, _Pointer)), None)
        if pointer is not None:
            others = [value for value in values if not isinstance(value, _Pointer)]
            if opcode in ("sadd", "scalar_lea") and len(others) == 1 and isinstance(others[0], int):
                return pointer._replace(offset=pointer.offset + others[0])
            return pointer if opcode in ("sshll", "sshra", "sshrl") else None
        left, right = [*values, None, None][:2]
        if not isinstance(left, int) or not isinstance(right, int):
            return None
        if opcode == "scmp":
            return _COMPARE[kind.partition(".")[0]](left, right)
        return _wrap(_ARITHMETIC[opcode](left, right)) if opcode in _ARITHMETIC else None

    def store(self, instruction: Instruction, holds: _Value) -> None:
        pointer = self.address(instruction.operands[0])
        if pointer is not None and holds is not False:
            value = self.read(instruction.operands[1]) if holds else None
            self.memory.setdefault(pointer.buffer, {})[pointer.offset] = value

    def transfer(self, instruction: Instruction, holds: _Value) -> None:
        if holds is False:
            return
        if holds is None:
            self.assumptions.add("a DMA is always issued")
        parameters = instruction.parameters
        granules = self.read(parameters.get("size_in_granules", ""))
        if not isinstance(granules, int):
            self.assumptions.add(f"a {instruction.opcode} of unknown size costs nothing")
            return
        self.hbm_bytes += granules * _GRANULE_BYTES * instruction.opcode.count("hbm")
        if instruction.opcode.endswith("to_smem"):
            source = self.read(next(iter(parameters.values())))
            target = self.read(parameters["smem"])
            if isinstance(source, _Pointer) and isinstance(target, _Pointer):
                words = self.memory.get(source.buffer, {})
                self.memory[target.buffer] = dict(words)


def _logic(opcode: str, values: Sequence[_Value]) -> bool | None:
    """Logic of predicates that may be unknown: false and unknown is false."""
    if opcode == "pxor":
        return None if None in values else values[0] != values[1]
    if opcode in ("pneg",):
        return None if values[0] is None else not values[0]
    decisive = opcode in ("por", "pnor")
    if any(value is not None and bool(value) == decisive for value in values):
        result = decisive
    elif None in values:
        return None
    else:
        result = not decisive
    return not result if opcode in ("pnor", "pnand") else result
