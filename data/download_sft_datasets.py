"""Downloads data sets, or the part of them that is asked for, as rows with a manifest.

    python data/download_sft_datasets.py
        the recipes' data: 280,000 rows of Glaive, 512 more to measure on, GSM8K and MBPP
    python data/download_sft_datasets.py --dataset glaive --split 'train[:180000]'
    python data/download_sft_datasets.py --dataset owner/name --split train --split test
    python data/download_sft_datasets.py --dataset rows.jsonl

Only the files that hold the rows asked for are downloaded. Every row is kept, with all columns that
could hold text; rows that training cannot use as they are are counted, by reason. An interrupted
download goes on where it stopped when the same command is given again; a complete one is left as it
is. The token of HF_TOKEN or `hf auth login` is sent to the hub, HF_ENDPOINT names another hub,
HF_HUB_DOWNLOAD_TIMEOUT is the number of seconds without a byte after which a request is tried again
(10).

--revision COMMIT gives the same rows on every machine. Without it each output directory keeps to
the commit that "main" meant there at first; the commit is printed, and kept in manifest.json.

Exit codes: 0 all is there, 1 the hub did not deliver in spite of the retries or the disk is full,
2 wrong input or no network.
"""

import argparse
import difflib
import errno
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import huggingface_hub
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from jaxsft import __version__
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, fail, run_process
from jaxsft.common.console import make_console
from jaxsft.common.files import file_sha256
from jaxsft.common.streams import safe_streams
from jaxsft.data.fields import PARTS
from jaxsft.data.rows import ROWS_VERSION
from jaxsft.download.datasets import (
    Progress,
    Request,
    convert_file,
    download_splits,
    finished,
    tidy_up,
)
from jaxsft.download.files import Hub, HubError, NoNetworkError, user_token
from jaxsft.download.splits import KNOWN, ROW_FILE, Known, parse_split

PLAIN_LINE_EVERY_S = 15.0
NAME = re.compile(r"\w[\w.-]*")  # of an owner, a data set or a subset; safe as a folder's name
FILE_KINDS = "a file of rows (JSON, CSV, Parquet)"


class Reporter(Progress):
    """Two bars on a terminal, a line now and then elsewhere; both with the time that is left."""

    def __init__(self, console: Console):
        self.console = console
        self.bars: Bars | None = None
        self.what = ""
        self.total, self.done = [0, 0], [0, 0]  # bytes, rows
        self.seconds = [0.0, 0.0]  # spent on them
        self.last_event_s = self.last_line_s = time.monotonic()

    def plan(self, what: str, num_bytes: int, num_rows: int) -> None:
        """Begins a directory."""
        self.end()
        self.what, self.total, self.done = what, [num_bytes, num_rows], [0, 0]
        self.last_event_s = self.last_line_s = time.monotonic()
        if num_bytes or num_rows:
            rows = f", {num_rows:,} rows to convert" if num_rows else ""
            self.line(f"{what}: {num_bytes / 1e6:,.1f} MB to download{rows}")
        if self.console.is_terminal:
            fields = (TextColumn("{task.fields[amount]}"), TextColumn("{task.fields[left]}"))
            self.bars = Bars(
                "{task.description}", BarColumn(), *fields, console=self.console, transient=True
            )
            for name, total in zip(("download", "convert"), self.total, strict=True):
                self.bars.add_task(name, total=total or None, amount="", left="")
            self.bars.start()

    def received(self, num_bytes: int) -> None:
        """Counts bytes."""
        self._more(0, num_bytes)

    def converted(self, num_rows: int) -> None:
        """Counts source rows."""
        self._more(1, num_rows)

    def _more(self, kind: int, amount: int) -> None:
        now_s = time.monotonic()
        self.seconds[kind] += now_s - self.last_event_s
        self.done[kind] += amount
        self.last_event_s = now_s
        of_rows = f" of {self.total[1]:,}" if self.total[1] else ""
        amounts = (
            f"{self.done[0] / 1e6:,.1f} of {self.total[0] / 1e6:,.1f} MB",
            f"{self.done[1]:,}{of_rows} rows",
        )
        if self.bars is not None:
            for task, text in zip(self.bars.tasks, amounts, strict=True):
                left = f"ETA {self._left()}" if task.id == 0 else ""
                self.bars.update(task.id, completed=self.done[task.id], amount=text, left=left)
        elif now_s - self.last_line_s > PLAIN_LINE_EVERY_S:
            self.line(f"{self.what}: {', '.join(amounts)}, ETA {self._left()}")
            self.last_line_s = now_s

    def _left(self) -> str:
        """The rest of what has begun, bytes and rows each at their own speed so far."""
        left_s = 0.0
        for total, done, seconds in zip(self.total, self.done, self.seconds, strict=True):
            if 0 < done < total:
                left_s += (total - done) * seconds / done
        return f"{int(left_s) // 3600}:{int(left_s) // 60 % 60:02d}:{int(left_s) % 60:02d}"

    def line(self, text: str) -> None:
        """Prints a line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Takes the bars away."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options; ValueError names a wrong one, and the nearest right one."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = _Parser(
        prog="python data/download_sft_datasets.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"jaxsft {__version__}")
    known = ", ".join(KNOWN)
    add(
        "--dataset",
        metavar="NAME",
        help=f"{known}, owner/name on the hub, or {FILE_KINDS} (default: {known})",
    )
    add(
        "--split",
        metavar="SPLIT",
        action="append",
        help="train, train[:180000] or train[180000:280000]; may be repeated "
        "(default: train, or all that the recipe uses)",
    )
    add("--subset", metavar="NAME", help="of a hub data set that has several (default: its own)")
    add(
        "--column",
        metavar="PART=NAME",
        action="append",
        default=[],
        help="a column that holds a part of the rows, as prompt=task, where its name does not "
        "tell; may be repeated; the same go into data.columns of training",
    )
    add(
        "--revision",
        default="main",
        help="branch, tag or commit of the hub data set (default: main); a commit gives the same "
        "rows on every machine, the others are looked up once and kept in revision.json; the "
        "commit used is printed and kept in manifest.json",
    )
    add("--output_dir", type=Path, default=Path("data"), help="default: data")
    add("--rows_per_file", type=int, default=20_000, help="source rows per file (default: 20000)")
    add("--retries", type=int, default=6, help="tries in a row without any data (default: 6)")
    add(
        "--retry_wait",
        type=float,
        default=1.0,
        help="seconds before the first retry, doubled for each more, unless the hub says how long "
        "(default: 1)",
    )
    options, others = parser.parse_known_args(argv)
    if others:
        names = [name for action in parser._actions for name in action.option_strings]
        other = others[0].split("=")[0]  # its value may be a secret
        near = difflib.get_close_matches(other, names, 1, 0.8)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown option {other!r}; {hint}--help lists all")
    if options.rows_per_file < 1 or options.retries < 0 or not 0 <= options.retry_wait < 1e6:
        raise ValueError("--rows_per_file must be positive, --retries, --retry_wait not negative")
    for text in options.column:
        part, _, name = text.partition("=")
        if part not in PARTS or not name:
            raise ValueError(f"--column {text}: write PART=NAME; the parts are {', '.join(PARTS)}")
    of_one = options.split or options.subset or options.column or options.revision != "main"
    if options.dataset is None and of_one:
        raise ValueError(
            "--split, --subset, --column and --revision need --dataset; which one do you mean?"
        )
    return options


def hub_requests(name: str, options: argparse.Namespace) -> list[Request]:
    """What is asked for of one hub data set; ValueError where `name` is none."""
    if name in KNOWN:
        known, folder = KNOWN[name], name
    elif all(NAME.fullmatch(part) for part in name.split("/")) and name.count("/") == 1:
        known, folder = Known(name, None, ("train",)), name.replace("/", "--")
    else:
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"--dataset {name}: no such file; use {', '.join(KNOWN)}, owner/name on the hub, or "
            f"{FILE_KINDS}{hint}"
        )
    if options.subset and not NAME.fullmatch(options.subset):
        raise ValueError(f"--subset {options.subset}: not a name on the hub")
    subset = options.subset or known.subset
    prefix = f"{options.subset}-" if options.subset else ""
    source = {"repo": known.repo, "subset": subset, "revision": options.revision}
    return _requests(options, folder, source, known.splits, prefix)


def file_requests(file: Path, options: argparse.Namespace) -> list[Request]:
    """What is asked for of a local file."""
    if options.subset or options.revision != "main":
        raise ValueError(f"{file}: is a file; --subset and --revision are for the hub's data sets")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    stem = ROW_FILE.sub("", file.name)
    if not NAME.fullmatch(stem):
        raise ValueError(f"{file}: names the output; rename it, with letters, digits, _ . and -")
    source = {"file": file.name, "sha256": file_sha256(file)}
    return _requests(options, stem, source, ("train",))


def _requests(
    options: argparse.Namespace,
    folder: str,
    source: dict[str, Any],
    splits: Sequence[str],
    prefix: str = "",
) -> list[Request]:
    home, size = options.output_dir / folder, options.rows_per_file
    wanted = dict.fromkeys(parse_split(text) for text in options.split or splits)
    columns = dict(text.split("=", 1) for text in options.column) or None
    return [Request(home / (prefix + s.directory_name), source, s, size, columns) for s in wanted]


def report_finished(reporter: Reporter, directory: Path, manifest: dict[str, Any]) -> None:
    """One line: what the directory holds, and which rows training cannot use."""
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in manifest["rejected"].items())
    size = sum(file["bytes"] for file in manifest["files"]) / 1e6
    reporter.line(
        f"{directory}: {manifest['rows']:,} of {manifest['rows_read']:,} rows, "
        f"{len(manifest['files'])} files, {size:,.1f} MB"
        + (f", revision {manifest['revision']}" if manifest["revision"] else "")
        + (f"; cannot be used as they are: {rejected}" if rejected else "")
    )


def obtain(name: str, options: argparse.Namespace, hub: Hub, reporter: Reporter) -> None:
    """Makes every directory of one data set that is not complete."""
    file = Path(name)
    is_file = file.is_file() or ROW_FILE.search(name) is not None
    requests = file_requests(file, options) if is_file else hub_requests(name, options)
    missing = []
    for request in requests:
        manifest = finished(request)
        if manifest is None:
            missing.append(request)
        elif manifest.get("converter") == ROWS_VERSION:
            reporter.line(f"{request.directory}: complete, nothing to do")
        else:
            other = "made by another version, which may have kept less; delete it to make it anew"
            reporter.line(f"{request.directory}: complete, nothing to do; {other}")
    if not missing:
        tidy_up(requests)
    elif is_file:
        for request in missing:
            report_finished(reporter, request.directory, convert_file(file, request, reporter))
    else:
        for directory, manifest in download_splits(hub, missing, reporter):
            report_finished(reporter, directory, manifest)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    with safe_streams():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> int:
    huggingface_hub.utils.logging.set_verbosity_error()
    reporter = Reporter(make_console())
    try:
        try:
            options = parse_arguments(argv)
            hub = Hub(user_token(), options.retries, options.retry_wait, reporter.line)
            for name in [options.dataset] if options.dataset else KNOWN:
                obtain(name, options, hub, reporter)
        finally:
            reporter.end()
    except NoNetworkError as error:
        host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
        return fail(
            f"cannot reach {host} ({error}): without a network name a file that you have, "
            "--dataset FILE, or train on data/sample/train.jsonl",
            EXIT_BAD_INPUT,
        )
    except HubError as error:
        return fail(f"{error}; the same command goes on where it stopped", EXIT_FAILED)
    except ValueError as error:
        return fail(error, EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = "no space left: make room or name another --output_dir"
            return fail(f"{error.filename or options.output_dir}: {full}", EXIT_FAILED)
        return fail(f"{error.filename or 'a file'}: {error.strerror or error}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where it stopped", EXIT_INTERRUPTED)
    return 0


if __name__ == "__main__":
    run_process(main)
