"""Reads XLA's out-of-memory errors: how much memory was needed, and how much there was."""

import re
from typing import NamedTuple


class Shortage(NamedTuple):
    """Bytes; None where the message doesn't tell. `memory`: as XLA calls it, "hbm", "vmem", …

    `needed_bytes` are the whole program's where the compiler refused it, else one allocation's.
    """

    memory: str | None
    needed_bytes: int | None
    available_bytes: int | None


# RESOURCE_EXHAUSTED alone may be a quota, or a message too long to send.
_SIZE = r"[\d.]+ ?[KMGT]?i?B?"
# With sources: jaxlib's and libtpu's texts, and issues that quote them.
_NEEDED = (
    # XLA:TPU, compiling
    rf"\((?P<needed>{_SIZE})\) exceeds available (?P<memory>\w+) \((?P<available>{_SIZE})\)",
    rf"Used (?P<needed>{_SIZE}) of (?P<available>{_SIZE}) (?P<memory>\w+)",  # erfanzar/EasyDeL#78
    # XLA:TPU, running: google-deepmind/gemma#85, huggingface/transformers#22328
    rf"ttempting to (?:allocate|reserve) (?P<needed>{_SIZE})",
    # XLA:GPU, its BFC allocator, XLA:CPU: jaxline#11, nemos#345, mesh-transformer-jax#209
    rf"ut of memory (?:while )?(?:trying to )?allocat(?:e|ing) (?P<needed>{_SIZE})",
    rf"ailed to alloc(?:ate)? (?:request for )?(?P<needed>{_SIZE})",
)
_AVAILABLE = (
    rf"(?P<available>{_SIZE}) reservable",  # what fragments leave of the free memory
    rf"largest contiguous region of free memory is (?P<available>{_SIZE})",  # google/trax#431
    rf"There are (?P<available>{_SIZE}) free",
)


def parse_shortage(message: str) -> Shortage | None:
    """What the message of an error says; None where it is about something else."""
    lower = message.casefold()
    if not re.search(
        r"out of memory|out_of_memory|resource.exhausted.*(memory|alloc)", lower, re.S
    ):
        return None
    found: dict[str, str | None] = {}
    for patterns in (_NEEDED, _AVAILABLE):
        matches = (re.search(pattern, message) for pattern in patterns)
        match = next((match for match in matches if match is not None), None)
        if match is not None:
            found = match.groupdict() | found
    memory = found.get("memory")
    return Shortage(
        memory=None if memory is None else memory.lower(),
        needed_bytes=_bytes(found.get("needed")),
        available_bytes=_bytes(found.get("available")),
    )


def _bytes(text: str | None) -> int | None:
    """15.75G, 2.00GiB, 512 -> bytes."""
    if text is None:
        return None
    number = re.match(r"[\d.]+", text)
    assert number is not None
    unit = text[number.end() :].strip()[:1]
    factor = 1024 ** ("KMGT".index(unit) + 1) if unit and unit in "KMGT" else 1
    return int(float(number.group()) * factor)
