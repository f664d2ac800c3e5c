"""libtpu's text of a TPU kernel's final program ("...final_bundles.txt") as basic blocks."""

import re
from typing import NamedTuple

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


class Instruction(NamedTuple):
    """A scalar instruction. Where `predicate` is false it gives `otherwise` ("": nothing)."""

    result: str
    opcode: str
    predicate: str  # "", %p.. or !%p..
    otherwise: str
    operands: tuple[str, ...]
    parameters: dict[str, str]  # those that the dump names, as /*name=*/value


class Block(NamedTuple):
    """Bundles that run one after the other. The branch, if any, takes effect after the last."""

    start: int
    cycles: int
    mxu_rows: int
    instructions: tuple[Instruction, ...]
    predicate: str
    target: int | None


def parse_blocks(final_bundles: str, mxu_rows_per_cycle: int) -> dict[int, Block]:
    """Basic blocks by their first bundle, in order."""
    bundles: list[str] = []
    for line in final_bundles.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:  # the parameters of a DMA go on over several lines
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
        blocks[start] = Block(start, cycles, rows, instructions, predicate, target)
    return blocks


def _issue(bundles: list[str], mxu_rows_per_cycle: int) -> tuple[int, int]:
    """Cycles that a run of bundles takes, and the rows that all matrix units take in it.

    A bundle a cycle, but one with a `vmatmul` waits until its matrix unit has taken the rows of
    the one before: the scheduler packs them closer than that.
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


def _parse_bundle(text: str) -> list[Instruction]:
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
            Instruction(
                result,
                opcode,
                predicate.group(1) if predicate else "",
                (predicate.group(2) or "") if predicate else "",
                tuple(operand.strip() for operand in operands),
                dict(_PARAMETER.findall(rest)),
            )
        )
    return sorted(instructions, key=lambda instruction: instruction.opcode != "sphi")
