"""The options of the inspect command that are not train's."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsft.cli import check_output


class InspectOptions(NamedTuple):
    """The options of this command that are not train's."""

    rows: int = 3
    row: list[int] | None = None
    ids: bool = False
    html: Path | None = None
    prepared: Path | None = None


def parse_inspect_options(argv: Sequence[str]) -> tuple[InspectOptions, list[str]]:
    """(this command's own options, the other arguments); bad ones raise ValueError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", type=int, default=InspectOptions().rows)
    which.add_argument("--row", type=int, action="append")
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--prepared", type=Path)
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    options = InspectOptions(**vars(found))
    if options.rows < 0:
        raise ValueError(f"--rows {options.rows}: must not be negative")
    if options.html is not None:
        check_output("--html", str(options.html))
    return options, rest
