"""Opens the prepared rows of a run; prepares those that are missing."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from jaxsft.common.files import cache_dir
from jaxsft.config import DataOptions, ModelOptions
from jaxsft.data.packing import Sample
from jaxsft.data.prepared import Prepared, prepare
from jaxsft.data.samples import DataReport, as_list
from jaxsft.data.sources import count_rows
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.download.names import find_row_files
from jaxsft.prepare.report import preparing
from jaxsft.weights.find import Origin, find_base


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything on the data side. `heldout` is None, and its samples none, without such files."""

    tokenizer: Tokenizer
    train: Prepared
    heldout: Prepared | None
    heldout_samples: list[Sample]


def run_model(options: ModelOptions) -> Origin:
    """The model that a run trains, downloaded if it is the hub's; ValueError where nothing is."""
    try:
        return find_base(options.path, options.tokenizer)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def load_data(
    options: DataOptions,
    tokenizer: Tokenizer,
    console: Console | None = None,
    on_progress: Callable[[], None] = lambda: None,
    *,
    may_download: bool = True,
) -> Data:
    """All rows that the options name, prepared unless they are already; see `prepared.prepare`.

    Files and names of the hub's data sets are found first; see `names.find_row_files`.

    Args:
      console: shows the progress.
      on_progress: called now and then.
      may_download: if not, data sets of the hub must be in the cache.

    Raises:
      ValueError: names the file and line. ConnectionError: the hub fails.
    """
    root = Path(options.prepared_dir) if options.prepared_dir else cache_dir("prepared")
    console = console or Console(quiet=True)

    def find(files: list[str] | str) -> list[Path]:
        return find_row_files(
            as_list(files),
            console.print,
            columns=options.columns,
            on_progress=on_progress,
            may_download=may_download,
        )

    train_files, heldout_files = find(options.train_files), find(options.eval_files)
    with preparing(console, _num_rows(train_files, options)) as show:

        def progress(report: DataReport) -> None:
            on_progress()
            show(report)

        train = prepare(
            train_files,
            tokenizer,
            options,
            root,
            heldout_files=heldout_files,
            progress=progress,
        )
    _check_columns(options, train.report)
    num_plain = train.report.noted.get("plain_completion", 0)
    drops = options.system_prompt is not None and options.without_thought == "drop_system"
    if drops and console is not None and 2 * num_plain > train.report.samples:
        console.print(
            f"{num_plain:,} of {train.report.samples:,} samples have no thought: they are trained "
            "without data.system_prompt, which held-out rows and generate have; give "
            "--data.system_prompt null for data without thoughts"
        )
    if not heldout_files:
        return Data(tokenizer, train, None, [])
    heldout = load_heldout(
        heldout_files, tokenizer, options, root, progress=lambda report: on_progress()
    )
    return Data(tokenizer, train, heldout, all_samples(heldout))


def _check_columns(options: DataOptions, report: DataReport) -> None:
    """ValueError if no training row has a column that the user named."""
    used = {name for columns in report.columns.values() for name in columns["used"]}
    missing = sorted(set((options.columns or {}).values()) - used)
    if missing:
        others = {name for columns in report.columns.values() for name in columns["unused"]}
        raise ValueError(
            f"data.columns names {', '.join(missing)}, which no training row has; their columns "
            f"are {', '.join(sorted(used | others)[:20])}"
        )


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
        without_thought="keep_plain",  # the answer asked for is one with a thought
        min_completion_tokens=0,
        drop_degenerate=False,
        drop_duplicates=False,
        max_drop=1.0,
    )
    return prepare(files, tokenizer, as_it_is, root, progress=progress)


def all_samples(prepared: Prepared) -> list[Sample]:
    """Its samples, each once, in the order of the files."""
    return [prepared.rows.sample(i) for i in range(prepared.rows.num_samples)]


def _num_rows(files: Sequence[Path], options: DataOptions) -> int | None:
    """Rows that will be read, where that is known beforehand."""
    counts = [count_rows(file) for file in files]
    if None in counts:
        return None if options.stop is None else options.stop - options.start
    stop = sum(filter(None, counts)) if options.stop is None else options.stop
    return max(stop - options.start, 0)
