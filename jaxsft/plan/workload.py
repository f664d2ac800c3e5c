"""Rows, steps and padding of a data set, from the lengths of its samples alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.data.bins import one_per_row, pack
from jaxsft.data.packing import num_steps

MAX_SAMPLES = 100_000_000  # a histogram is expanded: 0.8 GB of lengths


class Workload(NamedTuple):
    """A run over some samples. Shares are of all row positions, 0 to 1.

    `num_samples`, `num_tokens` and `num_rows` are those of one epoch, after cutting or dropping
    what is longer than a row.
    """

    num_samples: int
    num_tokens: int
    num_rows: int
    num_steps: int
    padding_share: float
    loss_share: float


def read_lengths(path: Path | str) -> list[int]:
    """Tokens of each sample, from a JSON histogram {length: count} or a text of one length a line.

    Raises ValueError, in one line, for a file that is neither.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable file of lengths: {error}") from error
    if text.lstrip().startswith("{"):
        lengths = _expand(path, text)
    else:
        lengths = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                lengths.append(_whole(line.strip(), 1, f"{path}:{number}: a sample's length"))
    if not lengths:
        raise ValueError(f"{path}: no lengths in it")
    return lengths


def _expand(path: Path, text: str) -> list[int]:
    """The lengths, ascending, that a JSON histogram counts."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON histogram {{length: count}}: {error}") from error
    counts: dict[int, int] = {}
    for key, value in pairs:
        length = _whole(key, 1, f"{path}: a length")
        counts[length] = counts.get(length, 0) + _whole(value, 0, f"{path}: length {length}: count")
    if sum(counts.values()) > MAX_SAMPLES:
        raise ValueError(f"{path}: more than {MAX_SAMPLES:,} samples; scale the counts down")
    return [length for length, count in sorted(counts.items()) for _ in range(count)]


def _whole(value: Any, least: int, what: str) -> int:
    """`value`, a number or its digits, as an int of at least `least`; ValueError names `what`."""
    is_digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
    if is_digits or type(value) is int:
        number = int(value)
        if number >= least:
            return number
    raise ValueError(f"{what} is {str(value)[:40]!r}, but must be a whole number from {least}")


def fit_lengths(lengths: Sequence[int], max_length: int, overlong: str) -> list[int]:
    """The lengths that are left once `overlong` (shorten, drop or raise) has been applied.

    Raises ValueError where nothing is left, and for a longer sample when that is to raise.
    """
    longest = max(lengths)
    if overlong == "raise" and longest > max_length:
        raise ValueError(
            f"the longest sample has {longest} tokens, more than data.max_length {max_length}; "
            "raise it, or set data.overlong to shorten or drop"
        )
    if overlong == "drop":
        kept = [length for length in lengths if length <= max_length]
        if not kept:
            raise ValueError(f"every sample is longer than data.max_length {max_length}")
        return kept
    return [min(length, max_length) for length in lengths]


def count_work(
    lengths: Sequence[int],
    *,
    row_length: int,
    packing: bool,
    global_batch_size: int,
    epochs: float,
    num_loss_tokens: int | None = None,
) -> Workload:
    """The workload of samples no longer than a row, packed or one a row.

    Without `num_loss_tokens` every token bears loss, padding none.
    """
    assign = pack if packing else one_per_row
    num_rows, num_tokens = len(assign(lengths, row_length)), sum(lengths)
    num_positions = num_rows * row_length
    return Workload(
        num_samples=len(lengths),
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_steps=num_steps(num_rows, epochs, global_batch_size),
        padding_share=1 - num_tokens / num_positions,
        loss_share=(num_tokens if num_loss_tokens is None else num_loss_tokens) / num_positions,
    )
