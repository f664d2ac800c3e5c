"""Shows what the model will really see: `python -m jaxsft.inspect [--config RECIPE] [--rows 3] …`.

Takes what train takes, and prepares its rows where they are missing, or a prepared directory. Rows
are shown token by token with their mask, then the counts of the whole set; every sample is checked.

Exit codes: 0 every sample is as it must be; 1 some are not (each is named); 2 bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from jaxsft.cli import EXIT_FAILED, check_output, parse_config, run_command
from jaxsft.common.files import write_text
from jaxsft.config import TrainConfig
from jaxsft.data.prepared import Prepared, open_prepared
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.inspect.page import page
from jaxsft.inspect.report import legend, show_checks, show_counts, show_row
from jaxsft.inspect.rows import survey
from jaxsft.inspect.tokens import RowReader
from jaxsft.prepare.__main__ import load_data, load_tokenizer, model_path

DESCRIPTION = (
    "Shows some rows as the model will see them, every token with its mask, and the counts of all "
    "rows, and checks every sample. Options of its own: --rows N (the first N rows; default 3), "
    "--row I (this row, from 0; may be repeated), --ids (each token's id), --html FILE (the same "
    "and histograms, as a page), --prepared DIR (a directory of prepared rows, made with the "
    "config's tokenizer, in place of the config's data). All others are train's."
)
_LOG_WIDTH = 160  # logs have room, whatever the terminal has


class InspectOptions(NamedTuple):
    """The options of this command that are not train's."""

    rows: int = 3
    row: list[int] | None = None
    ids: bool = False
    html: Path | None = None
    prepared: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv), memory_advice="shorter lines take less")


def command(argv: Sequence[str]) -> int:
    """Shows and checks what `argv` asks for. ValueError and OSError are bad input."""
    width = None if sys.stdout.isatty() else _LOG_WIDTH
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    options, rest = parse_options(argv)
    config, _ = parse_config("jaxsft.inspect", DESCRIPTION, rest)
    prepared, tokenizer = find_rows(config, options, console)
    indices = chosen_rows(options, len(prepared.rows))
    with console.status("checking every sample …"):
        found = survey(prepared, tokenizer)
    reader = RowReader(prepared, tokenizer)
    rows = [reader.view(index) for index in indices]
    if options.html is not None:
        write_text(options.html, page(prepared, found, rows, show_ids=options.ids))
    if rows:
        console.print(legend(), "", sep="\n", soft_wrap=True)
    for row in rows:
        for part in show_row(row, prepared.rows.row_length, options.ids):
            console.print(part, soft_wrap=True)
    for part in show_counts(prepared, found):
        console.print(part)
    for part in show_checks(found.checks, prepared.rows.num_samples):
        console.print(part, soft_wrap=True)
    console.print(f"in {prepared.directory}", soft_wrap=True)
    if options.html is not None:
        console.print(f"page: {options.html}", soft_wrap=True)
    return EXIT_FAILED if found.num_failed else 0


def parse_options(argv: Sequence[str]) -> tuple[InspectOptions, list[str]]:
    """(this command's options, the others); ValueError in one line."""
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


def find_rows(
    config: TrainConfig, options: InspectOptions, console: Console
) -> tuple[Prepared, Tokenizer]:
    """The rows to look at and their tokenizer; ValueError where they do not belong together."""
    path = model_path(config)
    if options.prepared is None:
        data = load_data(config, path, console)
        return data.train, data.tokenizer
    if not options.prepared.is_dir():
        raise ValueError(
            f"--prepared {options.prepared}: no such directory; python -m jaxsft.prepare says "
            "where it keeps its rows"
        )
    tokenizer = load_tokenizer(config, path)
    prepared = open_prepared(options.prepared)
    if prepared.manifest["made_from"]["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"--prepared {options.prepared}: made with another tokenizer than that of model.path "
            f"{config.model.path}; give the config that it was made with"
        )
    return prepared, tokenizer


def chosen_rows(options: InspectOptions, num_rows: int) -> list[int]:
    """Indices of the rows to show; ValueError where there is no such row."""
    if options.row is None:
        return list(range(min(options.rows, num_rows)))
    for index in options.row:
        if not 0 <= index < num_rows:
            raise ValueError(f"--row {index}: the rows are 0 to {num_rows - 1:,}")
    return options.row


if __name__ == "__main__":
    sys.exit(main())
