"""What a compiled training step keeps in HBM from its forward for its backward pass."""

import re
from collections.abc import Iterator

from jaxsft.hlo_text import HBM, Array, Computation, Instruction, Program

# The same value in another place or form; of an asynchronous copy the start has the operand.
_SAME_VALUE = frozenset({"bitcast", "copy", "copy-start", "copy-done", "reshape"})


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
    made: dict[tuple[str, int], Array] = {}
    for loop in computation.values():
        if loop.opcode == "while" and computation[loop.operands[0]].opcode == "tuple":
            for operand in computation[loop.operands[0]].operands:
                origin = _origin(program, computation, operand)
                if origin.opcode == "get-tuple-element":
                    source = computation[origin.operands[0]]
                    if source.opcode == "while":
                        made[source.name, _index(origin)] = origin.arrays[0]
    yield from made.values()


def _origin(program: Program, computation: Computation, name: str) -> Instruction:
    """What made a value, seen through copies, tuples and loops that only pass it on."""
    instruction = computation[name]
    if instruction.opcode in _SAME_VALUE:
        return _origin(program, computation, instruction.operands[0])
    if instruction.opcode != "get-tuple-element":
        return instruction
    index = _index(instruction)
    source = computation[instruction.operands[0]]
    if source.opcode == "while":
        body = program.computations[source.called("body")]
        if body.root.opcode != "tuple" or not _is_passed_on(body, index):
            return instruction
        source = computation[source.operands[0]]
    if source.opcode != "tuple":
        return instruction
    return _origin(program, computation, source.operands[index])


def _is_passed_on(body: Computation, index: int) -> bool:
    """Does a loop's body leave element `index` of its tuple as it is?"""
    after = body[body.root.operands[index]]
    return (
        after.opcode == "get-tuple-element"
        and body[after.operands[0]].opcode == "parameter"
        and _index(after) == index
    )


def _index(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    assert found is not None, instruction.name
    return int(found.group(1))
