"""Reads from XLA's out-of-memory errors how much memory was needed and how much was free."""

import re
from typing import NamedTuple

GENERAL_ADVICE = (
    "raise gradient_accumulation_steps, set model.remat to full, or lower data.max_length, "
    "eval.batch_size or, in grpo, rollout.batch_size"
)


class Shortage(NamedTuple):
    """What an error message says, None for what it does not. `memory` is "hbm", "vmem", …

    `needed_bytes` is for the whole program if the compiler refused it, else for one allocation.
    """

    memory: str | None
    needed_bytes: int | None
    available_bytes: int | None


_SIZE = r"[\d.]+ ?[KMGT]?i?B?"
# The texts are from jaxlib, libtpu, and the issues named beside them.
_NEEDED = (
    # XLA:TPU, at compile time
    rf"\((?P<needed>{_SIZE})\) exceeds available (?P<memory>\w+) \((?P<available>{_SIZE})\)",
    rf"Used (?P<needed>{_SIZE}) of (?P<available>{_SIZE}) (?P<memory>\w+)",  # erfanzar/EasyDeL#78
    # XLA:TPU, at run time: google-deepmind/gemma#85, huggingface/transformers#22328
    rf"ttempting to (?:allocate|reserve) (?P<needed>{_SIZE})",
    # XLA:GPU, its BFC allocator, XLA:CPU: jaxline#11, nemos#345, mesh-transformer-jax#209
    rf"ut of memory (?:while )?(?:trying to )?allocat(?:e|ing) (?P<needed>{_SIZE})",
    rf"ailed to alloc(?:ate)? (?:request for )?(?P<needed>{_SIZE})",
)
_AVAILABLE = (
    rf"(?P<available>{_SIZE}) reservable",  # the rest of the free memory is fragmented
    rf"largest contiguous region of free memory is (?P<available>{_SIZE})",  # google/trax#431
    rf"There are (?P<available>{_SIZE}) free",
)


def parse_shortage(message: str) -> Shortage | None:
    """The shortage in an error message; None if the message is about something else."""
    # RESOURCE_EXHAUSTED alone may be about a quota, or about a message that is too long to send.
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
