"""The matmul FLOPs of HLO instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxsft.plan.hlo_text import Computation, Instruction, Program


def matmuls(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, int]]:
    """The dots and convolutions in an instruction (itself, or in its fusion), with their FLOPs."""
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called("calls")]
        for child in inner.values():
            yield from matmuls(program, inner, child)
    elif instruction.opcode in ("dot", "convolution"):
        yield instruction, _matmul_flops(computation, instruction)


def _matmul_flops(computation: Computation, instruction: Instruction) -> int:
    """2 × output elements × contracted elements.

    The TPU compiler writes a dot as a convolution, batch dimensions as dilated spatial ones: like
    XLA's cost analysis, this counts only the window positions that fall on input elements.
    """
    lhs, rhs = (computation[operand].arrays[0].dims for operand in instruction.operands[:2])
    output = instruction.arrays[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = contracted.group(1).split(",") if contracted and contracted.group(1) else []
        return 2 * math.prod(output) * math.prod(lhs[int(dim)] for dim in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    lhs_labels, rhs_labels, output_labels = labels.groups()
    flops = 2 * output[output_labels.index("b")] * output[output_labels.index("f")]
    flops *= rhs[rhs_labels.index("i")]  # per feature group
    for index, window in enumerate(_windows(instruction.attributes)):
        label = str(index)
        flops *= _valid_positions(
            lhs[lhs_labels.index(label)], output[output_labels.index(label)], window
        )
    return flops


class _Window(NamedTuple):
    """One spatial dimension of a convolution's window."""

    size: int
    stride: int
    padding_low: int
    lhs_dilation: int
    rhs_dilation: int


def _windows(attributes: str) -> Iterator[_Window]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}
    for index in range(len(fields["size"].split("x")) if fields else 0):

        def field(name: str, default: str, index: int = index) -> int:
            value = fields[name].split("x")[index] if name in fields else default
            return int(value.split("_")[0])

        yield _Window(
            field("size", "1"),
            field("stride", "1"),
            field("pad", "0"),
            field("lhs_dilate", "1"),
            field("rhs_dilate", "1"),
        )


def _valid_positions(input_size: int, output_size: int, window: _Window) -> int:
    """Pairs of an output and a window position that meet an input element, not padding."""
    position = (
        np.arange(output_size)[:, None] * window.stride
        + np.arange(window.size)[None, :] * window.rhs_dilation
        - window.padding_low
    )
    inside = (position >= 0) & (position < (input_size - 1) * window.lhs_dilation + 1)
    return int(np.count_nonzero(inside & (position % window.lhs_dilation == 0)))
