"""The static schedule of a TPU kernel: how many cycles its bundles take, how many bytes it moves.

libtpu writes a kernel's final program ("...final_bundles.txt") as VLIW bundles, one a cycle. It has
the loops, branches and DMAs of the kernel and of Pallas' pipeline around it. Scalar code alone
decides how often a bundle runs: grid counters, `pl.when`, block indices from prefetched arrays. So
this module runs the scalar code, skips all vector instructions, and counts.

A bundle with a `vmatmul` waits for its matrix unit, which takes one row of the left-hand side a
cycle (two on v6e). That is the chip's peak rate; the scheduler packs such bundles closer. Checked
on v5e: 4096 × 4096 × 4096 takes 1,070,965 cycles here, 1,083,068 by XLA's own estimate, and
1,048,576 ideally. Smaller matmuls take 0.73 to 1.13 of XLA's estimate. Waits for DMAs are not
counted, so the caller also compares bytes with bandwidth.

Where scalar code depends on unknown values, a region runs, a DMA is issued, and a loop runs once.
`Schedule.assumptions` lists such places.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# --- text to basic blocks ---

# A branch takes effect after this many more bundles, on v5e and v6e.
_DELAY_SLOTS = 4

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_COMMENT = re.compile(r"/\*(?!\w+=\*/).*?\*/", re.S)
_PARAMETER = re.compile(r"/\*(\w+)=\*/\s*([^,\s]+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?%p\w+)\) )?target = \$region(\d+)")
_INSTRUCTION = re.compile(r"%(\w+) = ([a-z_][\w.]*)(?: \[(?:thread|resolvable):\S+\])? *(.*)", re.S)
_PREDICATE = re.compile(r"\((!?%p\w+)(?:, ([^)]+))?\),? *")
_VMATMUL = re.compile(r"vmatmul\.(?:mubr\.)?(\w+)\.[\w.]*(mxu\d)")
_OPERAND_INDEX = re.compile(r"index: (\d+)")


class ScalarOp(NamedTuple):
    """A scalar instruction or DMA. If `predicate` is false its result is `otherwise` ("": none)."""

    result: str
    opcode: str
    predicate: str  # "", %p.. or !%p..
    otherwise: str
    operands: tuple[str, ...]
    parameters: dict[str, str]  # written as /*name=*/value


class BasicBlock(NamedTuple):
    """Bundles that run one after the other; a branch, if any, takes effect after the last."""

    start: int
    cycles: int
    mxu_rows: int
    instructions: tuple[ScalarOp, ...]
    predicate: str
    target: int | None


def parse_blocks(final_bundles: str, mxu_rows_per_cycle: int) -> dict[int, BasicBlock]:
    """Basic blocks by their first bundle, in order."""
    bundles: list[str] = []
    for line in final_bundles.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:  # the parameters of a DMA take several lines
            bundles[-1] += "\n" + line
    region_starts = {
        region: index for index, text in enumerate(bundles) for region in _REGION.findall(text)
    }
    last = len(bundles) - 1
    branches: dict[int, tuple[str, int]] = {}  # by the last bundle before they take effect
    for index, text in enumerate(bundles):
        for predicate, region in _BRANCH.findall(text):
            branches[index + _DELAY_SLOTS] = (
                predicate,
                region_starts.get(region, last),  # the exit bundle's region isn't printed
            )
    starts = {0} | {target for _, target in branches.values()} | {end + 1 for end in branches}
    ordered = sorted(start for start in starts if start <= last)
    blocks = {}
    for start, after in zip(ordered, [*ordered[1:], len(bundles)], strict=True):
        texts = bundles[start:after]
        predicate, target = branches.get(after - 1, ("", None))
        instructions = tuple(i for text in texts for i in _parse_bundle(text))
        cycles, rows = _issue(texts, mxu_rows_per_cycle)
        blocks[start] = BasicBlock(start, cycles, rows, instructions, predicate, target)
    return blocks


def _issue(bundles: list[str], mxu_rows_per_cycle: int) -> tuple[int, int]:
    """(cycles of consecutive bundles, rows that all matrix units take in them).

    A bundle takes one cycle. A `vmatmul` first waits until its matrix unit has taken the rows of
    the one before.
    """
    cycle, num_rows = 0, 0
    free: dict[str, int] = {}  # the first cycle in which a matrix unit takes rows again
    for bundle in bundles:
        cycle += 1
        for dtype, unit in _VMATMUL.findall(bundle):
            rows = 8 if dtype.endswith("32") else 16  # of a register: 32-bit, or packed bf16
            cycle = max(cycle, free.get(unit, 0))
            free[unit] = cycle + rows // mxu_rows_per_cycle
            num_rows += rows
    return max([cycle, *free.values()]), num_rows


def _parse_bundle(text: str) -> list[ScalarOp]:
    """The scalar instructions of a bundle and its DMAs; phis first."""
    text = _COMMENT.sub("", text)
    instructions = []
    for part in text[text.index("{") + 1 : text.rindex("}")].split(";;"):
        found = _INSTRUCTION.match(part.strip())
        if found is None:
            continue
        result, opcode, rest = found.groups()
        if opcode != "sst" and not opcode.startswith("dma.") and result[0] not in "sp":
            continue
        predicate = _PREDICATE.match(rest)
        if predicate:
            rest = rest[predicate.end() :]
        if opcode.startswith("inlined_call_operand"):
            index = _OPERAND_INDEX.search(rest)
            operands: tuple[str, ...] = (index.group(1),) if index else ()
        else:
            operands = tuple(re.sub(r"/\*\w+=\*/", "", rest).replace("]] ", "]], ").split(","))
        instructions.append(
            ScalarOp(
                result,
                opcode,
                predicate.group(1) if predicate else "",
                (predicate.group(2) or "") if predicate else "",
                tuple(operand.strip() for operand in operands),
                dict(_PARAMETER.findall(rest)),
            )
        )
    return sorted(instructions, key=lambda instruction: instruction.opcode != "sphi")


# --- the run of the scalar code ---

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
    """Runs the scalar code of a kernel and counts.

    Args:
        final_bundles: the text of the dump.
        mxu_rows_per_cycle: rows of a left-hand side that one matrix unit takes in a cycle.
        operands: the 32-bit words of the operands with known contents (prefetched block indices
            and masks), by index.
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
    **{"sadd": operator.add, "ssub": operator.sub, "smul": operator.mul},
    **{"sand": operator.and_, "sor": operator.or_, "sxor": operator.xor},
    "sshll": lambda a, b: a << (b % 32),
    "sshrl": lambda a, b: (a % 2**32) >> (b % 32),
    "sshra": lambda a, b: a >> (b % 32),
    **{"smin": min, "smax": max},
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

    def run(self, instructions: Sequence[ScalarOp]) -> None:
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

    def branches(self, block: BasicBlock) -> bool:
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

    def evaluate(self, instruction: ScalarOp) -> _Value:
        opcode, _, kind = instruction.opcode.partition(".")
        if opcode == "inlined_call_operand":
            return _Pointer(f"operand{instruction.operands[0]}", 0)
        if opcode == "sphi":  # the operand that was written last
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
            return bool(getattr(operator, kind.partition(".")[0])(left, right))  # eq, lt, …
        return _wrap(_ARITHMETIC[opcode](left, right)) if opcode in _ARITHMETIC else None

    def store(self, instruction: ScalarOp, holds: _Value) -> None:
        pointer = self.address(instruction.operands[0])
        if pointer is not None and holds is not False:
            value = self.read(instruction.operands[1]) if holds else None
            self.memory.setdefault(pointer.buffer, {})[pointer.offset] = value

    def transfer(self, instruction: ScalarOp, holds: _Value) -> None:
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
    """Logic of predicates; None is unknown, and false and unknown is false."""
    if opcode == "pxor":
        return None if None in values else values[0] != values[1]
    if opcode == "pneg":
        return None if values[0] is None else not values[0]
    decisive = opcode in ("por", "pnor")
    is_decided = any(value is not None and bool(value) == decisive for value in values)
    if None in values and not is_decided:
        return None
    return (decisive == is_decided) != (opcode in ("pnor", "pnand"))
