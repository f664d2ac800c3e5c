"""The bytes in HBM that a compiled step saves in its forward pass for its backward pass."""

from collections.abc import Iterator

from jaxsft.plan.hlo_text import HBM, Array, Computation, Program
from jaxsft.plan.hlo_values import origin


def saved_activation_bytes(program: Program) -> int:
    """Bytes on each chip of what one loop makes and a later one reads, in HBM.

    Those are the arrays that the loop over the layers stacks up in the forward pass for that of the
    backward pass, and the few that the loop of the loss head takes and gives. What a loop only
    passes on (the frozen weights) is not made by it, and what stays in VMEM takes no HBM.
    """
    arrays = (
        array
        for computation in _scheduled(program, program.entry)
        for array in _between_loops(program, computation)
    )
    return sum(array.num_bytes for array in arrays if array.memory_space == HBM)


def _scheduled(program: Program, name: str) -> Iterator[Computation]:
    """The computations that run op by op: the entry and what its loops and calls run."""
    computation = program.computations[name]
    yield computation
    for instruction in computation.values():
        attributes = {"while": ("body",), "call": ("to_apply",)}.get(instruction.opcode, ())
        for called in (*map(instruction.called, attributes), *instruction.branches):
            yield from _scheduled(program, called)


def _between_loops(program: Program, computation: Computation) -> Iterator[Array]:
    """The arrays of a computation that one of its loops makes and another reads, each once."""
    made: dict[tuple[str, int | None], Array] = {}
    for loop in computation.values():
        if loop.opcode == "while" and computation[loop.operands[0]].opcode == "tuple":
            for operand in computation[loop.operands[0]].operands:
                source, index = origin(program, computation, operand)
                if source.opcode == "while" and index is not None:
                    made[source.name, index] = source.arrays[index]
    yield from made.values()
