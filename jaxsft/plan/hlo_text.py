"""Scheduled TPU HLO text (`compiled.as_text()`) as data: computations, instructions, shapes.

The grammar is that of XLA's HLO printer. Two things that a reader of the text must know:
a computation ends at a line that is exactly `}` (a Pallas call prints lines that start with `}}`),
and instructions stand in the order in which the chip runs them (`is_scheduled=true`).
"""

import math
import re
from typing import NamedTuple

_DTYPE_BITS = {"pred": 8, "token": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
HBM, VMEM = 0, 1  # XLA's memory spaces; others are scalar memory, sync flags and the host


class Array(NamedTuple):
    """One array of a shape. `num_bytes` counts the tiles' padding, as the memory does."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int
    num_bytes: int


class Instruction(NamedTuple):
    """One HLO instruction. `attributes` is all that follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the operand parentheses
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The result, or the parts of a tuple."""
        return parse_shape(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the result with all its parts."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """JAX's path of scopes and primitive, "" where the compiler made the instruction."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate of one run, None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None

    def called(self, attribute: str) -> str:
        """The computation that `attribute` (calls, body, condition, to_apply) names, or ""."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations between which a `conditional` chooses."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return tuple(_OPERAND.findall(found.group(1)))
        return tuple(
            name for key in ("true", "false") if (name := self.called(f"{key}_computation"))
        )

    @property
    def custom_call_target(self) -> str:
        """What a custom-call calls, "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in schedule order."""

    @property
    def root(self) -> Instruction:
        """The instruction that gives the result."""
        return next(instruction for instruction in self.values() if instruction.is_root)


class Program(NamedTuple):
    """A module: its computations by name, the entry's name, and the number of chips."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int


def parse_program(text: str) -> Program:
    """Parse `compiled.as_text()`. Raises ValueError for a text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry = ""
    lines: list[str] = []
    current: Computation | None = None

    def flush() -> None:
        if current is not None and lines:
            instruction = _parse_instruction("\n".join(lines))
            current[instruction.name] = instruction
        lines.clear()

    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations[header.group(2)] = Computation()
                entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            flush()
            current = None
        elif _INSTRUCTION.match(line):
            flush()
            lines.append(line)
        elif lines:
            lines.append(line)
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation; pass compiled.as_text()")
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions.group(1)) if partitions else 1)


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:100]}")


def _parse_instruction(text: str) -> Instruction:
    head = _INSTRUCTION.match(text)
    assert head is not None
    start = head.end()
    end = _balanced(text, start) if text[start] == "(" else text.index(" ", start)
    opening = text.index("(", end)
    closing = _balanced(text, opening)
    literal = text[opening + 1 : closing - 1]
    return Instruction(
        name=head.group(2),
        shape=text[start:end],
        opcode=text[end:opening].strip(),
        operands=tuple(_OPERAND.findall(literal)),
        literal=literal,
        attributes=text[closing:],
        is_root=head.group(1) is not None,
    )


def parse_shape(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape or (nested) tuple shape, left to right.

    The first tile of a layout, such as T(8,128), pads the most minor dimensions to its multiple;
    S(n) is the memory space, 0 (HBM) when absent.
    """
    arrays = []
    for dtype, dims_text, order, rest in _SHAPE.findall(shape):
        dims = tuple(int(dim) for dim in dims_text.split(",") if dim)
        padded = [dims[int(index)] for index in order.split(",") if index] or list(dims[::-1])
        tile = re.match(r"T\(([\d,]*)\)", rest)
        if tile and dims:
            sizes = [int(size) for size in tile.group(1).split(",")][::-1]
            for index, size in enumerate(sizes[: len(padded)]):
                padded[index] = -(-padded[index] // size) * size
        space = re.search(r"S\((\d+)\)", rest)
        digits = re.search(r"\d+", dtype)
        bits = _DTYPE_BITS.get(dtype, int(digits.group()) if digits else 0)
        num_bytes = -(-math.prod(padded) * bits // 8)
        arrays.append(Array(dtype, dims, int(space.group(1)) if space else HBM, num_bytes))
    return tuple(arrays)
