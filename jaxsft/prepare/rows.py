"""Makes a run's rows, once: `python -m jaxsft.prepare [--config RECIPE] [--OPTION …]`.

Reads, converts, filters, tokenises and packs what the config names and keeps the result, so that
`train`, which does the same where it is missing, begins at once. The same command again with
nothing changed only says what is there; any option that changes a row makes a set of its own.

Exit codes: 0 done; 2 bad input (one line says where, what and how to fix it; nothing is left); 130
interrupted.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from jaxsft.cli import parse_config, run_command
from jaxsft.common.files import cache_dir
from jaxsft.config import DataOptions, TrainConfig
from jaxsft.data.packing import Sample
from jaxsft.data.prepared import Prepared
from jaxsft.data.prepared_cache import prepare
from jaxsft.data.samples import DataReport, as_list
from jaxsft.data.sources import num_rows
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.prepare.report import preparing, show_data
from jaxsft.weights.find import base_path, find_tokenizer, open_tokenizer

DESCRIPTION = (
    "Reads, converts, filters, tokenises and packs the rows that a config names and keeps them for "
    "jaxsft.train. Takes the options of jaxsft.train; those of data, and the model's tokenizer, "
    "count."
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything on the data side. `heldout` is None, and its samples none, without such files."""

    tokenizer: Tokenizer
    train: Prepared
    heldout: Prepared | None
    heldout_samples: list[Sample]


def model_path(config: TrainConfig) -> Path:
    """Where the model's files are, fetched if they are the hub's; ValueError where nothing is."""
    try:
        return base_path(config.model.path, config.model.tokenizer)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def load_tokenizer(config: TrainConfig, path: Path) -> Tokenizer:
    """The tokenizer of the config, or of the model at `path`; ValueError where there is none."""
    return open_tokenizer(find_tokenizer(path, config.model.tokenizer))


def load_data(
    config: TrainConfig,
    path: Path,
    console: Console | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Data:
    """All rows of the config for the model at `path`, prepared unless they are; see `prepare`.

    `console` shows how far it has come; `on_progress` is called as it goes on. ValueError names the
    file and line.
    """
    options, tokenizer = config.data, load_tokenizer(config, path)
    root = Path(options.prepared_dir) if options.prepared_dir else cache_dir("prepared")
    heldout_files = as_list(options.eval_files)
    with preparing(console or Console(quiet=True), _num_rows(options)) as show:

        def progress(report: DataReport) -> None:
            on_progress()
            show(report)

        train = prepare(
            options.train_files,
            tokenizer,
            options,
            root,
            heldout_files=heldout_files,
            progress=progress,
        )
    if not heldout_files:
        return Data(tokenizer, train, None, [])
    heldout = load_heldout(
        heldout_files, tokenizer, options, root, progress=lambda report: on_progress()
    )
    return Data(tokenizer, train, heldout, all_samples(heldout))


def load_heldout(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    root: Path,
    progress: Callable[[DataReport], None] = lambda report: None,
) -> Prepared:
    """The rows to measure on, as the files have them: none is filtered out; see `prepare`."""
    as_it_is = dataclasses.replace(
        options,
        start=0,
        stop=None,
        weights=None,
        loss_on_prompt=False,
        min_completion_tokens=0,
        drop_degenerate=False,
        drop_duplicates=False,
        max_drop=1.0,
    )
    return prepare(files, tokenizer, as_it_is, root, progress=progress)


def all_samples(prepared: Prepared) -> list[Sample]:
    """Its samples, each once, in the order of the files."""
    return [prepared.rows.sample(i) for i in range(prepared.rows.num_samples)]


def _num_rows(options: DataOptions) -> int | None:
    """Rows that will be read, where that is known beforehand."""
    counts = [num_rows(file) for file in as_list(options.train_files)]
    if None in counts:
        return None if options.stop is None else options.stop - options.start
    stop = sum(filter(None, counts)) if options.stop is None else options.stop
    return max(stop - options.start, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv), memory_advice="shorter lines take less")


def command(argv: Sequence[str]) -> int:
    """Prepares the rows that `argv` asks for. ValueError and OSError are bad input."""
    # No markup: file names may hold brackets.
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    config, _ = parse_config("jaxsft.prepare", DESCRIPTION, argv)
    data = load_data(config, model_path(config), console)
    show_data(console, data.train, data.heldout)
    for prepared in filter(None, (data.train, data.heldout)):
        console.print(f"in {prepared.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
