"""What the terminal shows while rows are prepared, and of the result."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console

from jaxsft.data.prepared import Prepared
from jaxsft.data.samples import DataReport

_LINE_EVERY_S = 30.0  # where there is no terminal


def show_data(console: Console, train: Prepared, heldout: Prepared | None) -> None:
    """What became of every row."""

    def show(label: str, prepared: Prepared) -> None:
        for line in prepared.report.lines():
            console.print(f"{label}: {line}")
        rows, fewest = prepared.rows, prepared.manifest["fewest_rows"]
        best = f"; at best {rows.fill * len(rows) / fewest:.1%}" if fewest < len(rows) else ""
        console.print(
            f"{label}: {len(rows):,} rows of {rows.row_length} tokens, {rows.fill:.1%} full{best}"
        )

    show("train", train)
    if heldout is not None:
        show("held out", heldout)


@contextmanager
def preparing(console: Console, num_rows: int | None) -> Iterator[Callable[[DataReport], None]]:
    """Yields what is to be called with the counts so far: a live line on a terminal, else a line
    now and then. `num_rows` will be read, if that is known."""
    begin = last = time.monotonic()

    def line(report: DataReport) -> str:
        seconds = max(time.monotonic() - begin, 1e-9)
        text = (
            f"preparing rows: {report.rows_read:,} read, {report.num_tokens:,} tokens, "
            f"{report.num_tokens / seconds:,.0f} tokens/s"
        )
        if num_rows and report.rows_read:
            left_s = seconds * (num_rows / report.rows_read - 1)
            text += f", ETA {timedelta(seconds=int(max(left_s, 0)))}"
        return text

    if console.is_terminal:
        with console.status("preparing rows …") as status:
            yield lambda report: status.update(line(report))
        return

    def show(report: DataReport) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            console.print(line(report))

    yield show
