"""Values known before a program runs: trip counts of loops, and constants passed to kernels."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxsft.plan.hlo_text import Computation, Instruction, Program

_INTEGERS = {
    **{"pred": "int8", "s8": "int8", "s16": "int16", "s32": "int32"},
    **{"u8": "uint8", "u16": "uint16", "u32": "uint32"},
}

Callers = tuple[tuple[Computation, Instruction], ...]


class _Affine(NamedTuple):
    """A scalar: an element of the computation's tuple parameter (or none) plus a constant."""

    element: int | None
    offset: int


def _affine(program: Program, computation: Computation, name: str) -> _Affine | None:
    """The value of scalar `name`, or None where it is not of that form."""
    instruction = computation[name]
    operands = instruction.operands
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return _Affine(None, int(instruction.literal))
    if instruction.opcode == "get-tuple-element":
        if computation[operands[0]].opcode != "parameter":
            return None
        index = re.search(r"index=(\d+)", instruction.attributes)
        return _Affine(int(index.group(1)), 0) if index else None
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
    for name, instruction in inner.items():
        if instruction.opcode == "parameter":
            operand = outer[fusion.operands[int(instruction.literal)]]
            inlined[name] = operand
        else:
            inlined[name] = instruction
    return inlined


def static_trip_count(program: Program, loop: Instruction, callers: Callers) -> int | None:
    """How often a `while` runs its body, or None where that depends on data.

    TPU text carries no `known_trip_count`: the condition compares the induction variable, an
    element of the loop's tuple that the body changes by a constant, with a constant, which may
    itself be carried through the tuple. `callers` are the loops around this one and this one
    itself, outermost first, each with the computation in which it stands.
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
    """The 32-bit words of array `name` as memory holds them, or None where it isn't a constant.

    Follows copies, and tuples through the loops `callers` that leave the array as it is.
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
    """What made a value, seen through copies, tuples and loops that only pass it on.

    The instruction, and the element where it gives a tuple (a parameter, or a loop that changed
    the value).
    """
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast", "reshape", "copy-start", "copy-done"):
        return origin(program, computation, instruction.operands[0])
    if instruction.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.attributes)
        assert index is not None, name
        return _element(program, computation, instruction.operands[0], int(index.group(1)))
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
    """Does the loop's body return element `index` of its tuple as it got it?"""
    body = program.computations[loop.called("body")]
    if body.root.opcode != "tuple":
        return False
    found, element = origin(program, body, body.root.operands[index])
    return found.opcode == "parameter" and element == index


def _physical_words(values: np.ndarray, dtype: str, shape: str) -> list[int]:
    """An integer array as 32-bit words in the order of its tiled layout.

    A layout {1,0:T(4,128)(4,1)} keeps tiles of 4 × 128 elements one after the other, in each the
    columns, and in a column 4 rows, which for s8 share a word.
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
