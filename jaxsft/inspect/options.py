"""The options of the inspect command that are not train's."""

import dataclasses

from jaxsft.cli import check_output

NUM_ROWS = 3
LOG_WIDTH = 160  # of output that is no terminal


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Only of this command."""

    rows: int | None = None
    """Show the first rows, so many; by default 3, or those of --row."""
    row: list[int] | None = None
    """Show this row, counted from 0; may be repeated."""
    ids: bool = False
    """Show each token's id."""
    html: str | None = None
    """Write the same to this file as a page, with histograms."""
    prepared: str | None = None
    """Show this directory of prepared rows, not the data; the tokenizer must be the config's."""


def check_inspect_options(options: InspectOptions) -> None:
    """ValueError for options that are wrong or do not go together."""
    if options.rows is not None and options.row is not None:
        raise ValueError("--rows and --row: give one of them")
    if options.rows is not None and options.rows < 0:
        raise ValueError(f"--rows {options.rows}: must not be negative")
    if options.html is not None:
        check_output("--html", options.html)


def chosen_rows(options: InspectOptions, num_rows: int) -> list[int]:
    """Indices of the rows to show; ValueError where there is no such row."""
    if options.row is None:
        return list(range(min(NUM_ROWS if options.rows is None else options.rows, num_rows)))
    for index in options.row:
        if not 0 <= index < num_rows:
            raise ValueError(f"--row {index}: the rows are 0 to {num_rows - 1:,}")
    return options.row
