"""Shows rows token by token, counts the whole set and checks every sample."""

from pathlib import Path

from rich.console import Console

from jaxsft.cli import EXIT_FAILED
from jaxsft.common.console import make_console
from jaxsft.common.files import write_text
from jaxsft.config import TrainConfig
from jaxsft.data.prepared import Prepared, open_prepared
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.inspect.options import LOG_WIDTH, InspectOptions, chosen_rows
from jaxsft.inspect.page import inspection_page
from jaxsft.inspect.report import legend, show_checks, show_counts, show_row
from jaxsft.inspect.rows import survey
from jaxsft.inspect.tokens import view_row
from jaxsft.prepare.rows import load_data, run_model
from jaxsft.weights.find import open_tokenizer


def show_rows(config: TrainConfig, options: InspectOptions) -> int:
    """Shows and checks the rows; returns the exit code. ValueError and OSError are bad input."""
    console = make_console(log_width=LOG_WIDTH)
    prepared, tokenizer = find_rows(config, options, console)
    indices = chosen_rows(options, len(prepared.rows))
    with console.status("checking every sample …"):
        found = survey(prepared, tokenizer)
    rows = [view_row(prepared, tokenizer, index) for index in indices]
    if options.html is not None:
        html = inspection_page(prepared, found, rows, show_ids=options.ids)
        write_text(Path(options.html), html)
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


def find_rows(
    config: TrainConfig, options: InspectOptions, console: Console
) -> tuple[Prepared, Tokenizer]:
    """The rows to show and their tokenizer; ValueError where they do not belong together."""
    tokenizer = open_tokenizer(run_model(config.model).tokenizer)
    if options.prepared is None:
        return load_data(config.data, tokenizer, console).train, tokenizer
    directory = Path(options.prepared)
    if not directory.is_dir():
        raise ValueError(
            f"--prepared {options.prepared}: no such directory; python -m jaxsft.prepare says "
            "where it keeps its rows"
        )
    prepared = open_prepared(directory)
    if prepared.manifest["made_from"]["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"--prepared {options.prepared}: made with another tokenizer than that of model.path "
            f"{config.model.path}; give the config that it was made with"
        )
    return prepared, tokenizer
