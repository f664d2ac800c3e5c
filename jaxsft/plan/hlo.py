"""Scheduled TPU HLO text (`compiled.as_text()`) as data, and the values known before it runs.

The grammar is that of XLA's HLO printer. A reader of the text must know two things: a computation
ends at a line that is exactly `}` (a Pallas call prints lines that start with `}}`), and the chip
runs the instructions in the order of the text (`is_scheduled=true`).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# --- text to data ---

_DTYPE_BITS = {"pred": 8, "token": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
HBM, VMEM = 0, 1  # XLA's memory spaces; others are scalar memory, sync flags and the host


class Array(NamedTuple):
    """One array of a shape. `num_bytes` includes the padding of tiles in memory."""

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
    literal: str  # the text between the parentheses of the operands
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
        """JAX's path of scopes and primitive; "" where the compiler made the instruction."""
        return self._find(r'op_name="((?:[^"\\]|\\.)*)"')

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate of one run; None where it makes none."""
        cycles = self._find(r'"estimated_cycles":"(\d+)"')
        return int(cycles) if cycles else None

    def called(self, attribute: str) -> str:
        """The computation that `attribute` (calls, body, condition, to_apply) names, or ""."""
        return self._find(rf"\b{attribute}=%([\w.\-]+)")

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations among which a `conditional` chooses."""
        if listed := self._find(r"branch_computations=\{([^}]*)\}"):
            return tuple(_OPERAND.findall(listed))
        return tuple(filter(None, map(self.called, ("true_computation", "false_computation"))))

    @property
    def custom_call_target(self) -> str:
        """The target of a custom-call, "" for other instructions."""
        return self._find(r'custom_call_target="([^"]*)"')

    @property
    def element(self) -> int:
        """The element that a get-tuple-element takes."""
        return int(self._find(r"index=(\d+)"))

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of an attribute such as slice_sizes={1,128}; [] without it."""
        return [int(n) for n in self._find(rf"{attribute}=\{{([\d,]*)\}}").split(",") if n]

    def _find(self, pattern: str) -> str:
        """The first group of the pattern in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
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
    """Parses `compiled.as_text()`. Raises ValueError for a text without an entry computation."""
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

    The first tile of a layout, such as T(8,128), pads the most minor dimensions to its multiples.
    S(n) is the memory space; without it the array is in space 0, HBM.
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


# --- values known before the program runs ---

_INTEGERS = {
    **{"pred": "int8", "s8": "int8", "s16": "int16", "s32": "int32"},
    **{"u8": "uint8", "u16": "uint16", "u32": "uint32"},
}

Callers = tuple[tuple[Computation, Instruction], ...]


class _Affine(NamedTuple):
    """A scalar: a constant, plus an element of the computation's tuple parameter if not None."""

    element: int | None
    offset: int


def _affine(program: Program, computation: Computation, name: str) -> _Affine | None:
    """The value of scalar `name`; None where it has another form."""
    instruction = computation[name]
    operands = instruction.operands
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return _Affine(None, int(instruction.literal))
    if instruction.opcode == "get-tuple-element":
        is_parameter = computation[operands[0]].opcode == "parameter"
        return _Affine(instruction.element, 0) if is_parameter else None
    if instruction.opcode in ("copy", "bitcast", "reshape"):
        return _affine(program, computation, operands[0])
    if instruction.opcode in ("add", "subtract"):
        left, right = (_affine(program, computation, operand) for operand in operands)
        sign = 1 if instruction.opcode == "add" else -1
        if left is None or right is None or right.element is not None:
            left, right = right, left
            if sign < 0 or left is None or right is None or right.element is not None:
                return None
        return _Affine(left.element, left.offset + sign * right.offset)
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called("calls")]
        inlined = _inline(computation, instruction, inner)
        return _affine(program, inlined, inner.root.name)
    return None


def _inline(outer: Computation, fusion: Instruction, inner: Computation) -> Computation:
    """`inner` with its parameters replaced by the operands of `fusion`, for look-ups by name."""
    inlined = Computation(outer)
    for name, each in inner.items():
        is_parameter = each.opcode == "parameter"
        inlined[name] = outer[fusion.operands[int(each.literal)]] if is_parameter else each
    return inlined


def static_trip_count(program: Program, loop: Instruction, callers: Callers) -> int | None:
    """How often a `while` runs its body; None where that depends on data.

    TPU text has no `known_trip_count`. The condition compares the induction variable with a
    constant. The induction variable is an element of the loop's tuple, and the body changes it by a
    constant; the limit may be an element of the tuple too. `callers` are the loops around this one
    and this one itself, outermost first, each with the computation in which it stands.
    """
    condition = program.computations[loop.called("condition")]
    compare = condition.root
    if compare.opcode == "fusion":
        inner = program.computations[compare.called("calls")]
        condition = _inline(condition, compare, inner)
        compare = inner.root
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.opcode != "compare" or direction is None:
        return None
    left, right = (_affine(program, condition, operand) for operand in compare.operands)
    if left is None or right is None:
        return None
    body = program.computations[loop.called("body")]
    steps = _step(program, body, left), _step(program, body, right)
    starts = _initial(program, left, callers), _initial(program, right, callers)
    if steps[0] is None or steps[1] is None or starts[0] is None or starts[1] is None:
        return None
    # Compare left - right with 0: it starts at `gap` and moves by `step` each time.
    gap = starts[0] - starts[1]
    step = steps[0] - steps[1]
    if direction.group(1) in ("GT", "GE"):
        gap, step = -gap, -step
    if direction.group(1) in ("LE", "GE"):
        gap -= 1
    if direction.group(1) == "EQ" or step <= 0:
        return None
    return max(0, math.ceil(-gap / step))


def _step(program: Program, body: Computation, value: _Affine) -> int | None:
    """By how much one run of `body` changes `value`."""
    if value.element is None:
        return 0
    if body.root.opcode != "tuple":
        return None
    after = _affine(program, body, body.root.operands[value.element])
    return after.offset if after is not None and after.element == value.element else None


def _initial(program: Program, value: _Affine, callers: Callers) -> int | None:
    """`value` before the first iteration of the last of `callers`."""
    if value.element is None:
        return value.offset
    if not callers:
        return None
    computation, loop = callers[-1]
    operands = computation[loop.operands[0]]
    if operands.opcode != "tuple":
        return None
    outside = _affine(program, computation, operands.operands[value.element])
    if outside is None:
        return None
    if outside.element is not None and (
        len(callers) < 2
        or _step(program, program.computations[callers[-2][1].called("body")], outside) != 0
    ):
        return None
    before = _initial(program, outside, callers[:-1])
    return None if before is None else before + value.offset


def constant_words(
    program: Program, computation: Computation, name: str, callers: Callers
) -> list[int] | None:
    """The 32-bit words of array `name` as memory holds them; None where it is not a constant.

    Follows copies, and tuples through the loops `callers` that do not change the array.
    """
    constant = _constant(program, computation, name, callers)
    if constant is None or "..." in constant.literal:  # left out when the text was printed
        return None
    array = computation[name].arrays[0]
    numbers = re.findall(r"-?\d+|true|false", constant.literal)
    values = np.array([{"true": 1, "false": 0}.get(number, number) for number in numbers], np.int64)
    if array.dtype not in _INTEGERS or values.size != math.prod(array.dims):
        return None
    return _physical_words(values.reshape(array.dims), array.dtype, computation[name].shape)


def _constant(
    program: Program, computation: Computation, name: str, callers: Callers
) -> Instruction | None:
    found, index = origin(program, computation, name)
    while found.opcode == "parameter" and index is not None and callers:
        outer, loop = callers[-1]
        callers = callers[:-1]
        if not _is_carried(program, loop, index):
            return None
        found, index = _element(program, outer, loop.operands[0], index)
    return found if found.opcode == "constant" else None


def origin(program: Program, computation: Computation, name: str) -> tuple[Instruction, int | None]:
    """(the instruction that made a value, its element or None where it gives no tuple).

    Looks through copies, tuples, and loops that only pass the value on.
    """
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast", "reshape", "copy-start", "copy-done"):
        return origin(program, computation, instruction.operands[0])
    if instruction.opcode == "get-tuple-element":
        return _element(program, computation, instruction.operands[0], instruction.element)
    return instruction, None


def _element(
    program: Program, computation: Computation, name: str, index: int
) -> tuple[Instruction, int | None]:
    """`origin` of element `index` of the tuple `name`."""
    source = computation[name]
    if source.opcode == "tuple":
        return origin(program, computation, source.operands[index])
    if source.opcode == "while" and _is_carried(program, source, index):
        return _element(program, computation, source.operands[0], index)
    return source, index


def _is_carried(program: Program, loop: Instruction, index: int) -> bool:
    """Does the loop's body return element `index` of its tuple unchanged?"""
    body = program.computations[loop.called("body")]
    if body.root.opcode != "tuple":
        return False
    found, element = origin(program, body, body.root.operands[index])
    return found.opcode == "parameter" and element == index


def _physical_words(values: np.ndarray, dtype: str, shape: str) -> list[int]:
    """An integer array as 32-bit words in the order of its tiled layout.

    A layout {1,0:T(4,128)(4,1)} is a sequence of tiles of 4 × 128 elements. A tile is stored column
    after column; the 4 rows of a column share a word where the elements are s8.
    """
    found = re.search(r"\{([\d,]*):((?:T)?(?:\([\d,]+\))*)", shape)
    tiles = re.findall(r"\(([\d,]+)\)", found.group(2)) if found else []
    tile = [int(size) for size in tiles[0].split(",")] if tiles else [1]
    packed = int(tiles[-1].split(",")[0]) if len(tiles) > 1 else 1
    rows, lanes = ([1, *tile])[-2:]
    minor_to_major = [int(dim) for dim in found.group(1).split(",") if dim] if found else []
    ordered = values.transpose(minor_to_major[::-1]) if minor_to_major else values
    planes = ordered.reshape(-1, *([1, 1, *ordered.shape])[-2:])
    height, width = planes.shape[1:]
    planes = np.pad(planes, ((0, 0), (0, -height % rows), (0, -width % lanes)))
    tiled = planes.reshape(
        len(planes), -1, rows // packed, packed, planes.shape[2] // lanes, lanes
    ).transpose(0, 1, 4, 2, 5, 3)
    raw = tiled.astype(_INTEGERS[dtype]).tobytes()
    return np.frombuffer(raw + b"\0" * (-len(raw) % 4), np.int32).tolist()


# --- memory ---


def saved_activation_bytes(program: Program) -> int:
    """Bytes in HBM on each chip that a compiled step saves in its forward pass for its backward.

    These are the arrays that one loop makes and a later loop reads: the stacks of the loop over the
    layers, and the few arrays around the loop of the loss head. Arrays that a loop only passes on
    (the frozen weights) and arrays in VMEM do not count.
    """
    arrays = (
        array
        for computation in _scheduled(program, program.entry)
        for array in _between_loops(program, computation)
    )
    return sum(array.num_bytes for array in arrays if array.memory_space == HBM)


def _scheduled(program: Program, name: str) -> Iterator[Computation]:
    """The computations that run op by op: `name`, and the bodies of its loops and calls."""
    computation = program.computations[name]
    yield computation
    for instruction in computation.values():
        attributes = {"while": ("body",), "call": ("to_apply",)}.get(instruction.opcode, ())
        for called in (*map(instruction.called, attributes), *instruction.branches):
            yield from _scheduled(program, called)


def _between_loops(program: Program, computation: Computation) -> Iterator[Array]:
    """The arrays that one loop of the computation makes and another reads, each once."""
    made: dict[tuple[str, int | None], Array] = {}
    for loop in computation.values():
        if loop.opcode == "while" and computation[loop.operands[0]].opcode == "tuple":
            for operand in computation[loop.operands[0]].operands:
                source, index = origin(program, computation, operand)
                if source.opcode == "while" and index is not None:
                    made[source.name, index] = source.arrays[index]
    yield from made.values()
