"""Files -> samples, and packed rows -> batches served by Grain.

Reading is strict and names file:line; every row that is not used is counted. Batches need no
iterator state: step -> rows is arithmetic (`packing.StepBatches`), so a run resumes at any step.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from jaxsft.chat import encode_chats, shorten
from jaxsft.packing import Batch, Sample, StepBatches
from jaxsft.reasoning import Conversation, Rejected, Turn, convert_row
from jaxsft.tokenizer import Tokenizer

Overlong = Literal["shorten", "drop", "raise"]

_CHUNK_ROWS = 1024  # conversations tokenised by one call
_UTF8_BOM = b"\xef\xbb\xbf"


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) from a JSONL file, ("file:row n", row) from a .parquet file.

    JSONL is read line by line: UTF-8, with or without a byte order mark, LF or CRLF; blank lines
    are passed over.

    Raises:
      ValueError: no such file, a directory, an empty file, a line that is not UTF-8 or not one
        JSON object, a repeated key, NaN or Infinity, too deep nesting.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a .jsonl or .parquet file in it")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{path}: cannot be read ({why}); check the path") from None
    if empty:
        raise ValueError(f"{path}: is empty; it must hold one JSON object per line")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield where, _parse_line(line.rstrip(b"\r\n"))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise ValueError(
            f"byte {error.start + 1} of the line (0x{bad:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken or cut off at column {error.colno} ({error.msg}); "
            "every line must be one complete JSON object"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply; a row is a flat JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}; every line must be one JSON object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{name}" is there more than once; keep one')
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a number or null")


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as arrow  # slow to import, and only Parquet needs it
    import pyarrow.parquet as parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for records in file.iter_batches(batch_size=_CHUNK_ROWS):
                for row in records.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a complete Parquet file after row {number} ({str(error).splitlines()[0]})"
        ) from None


@dataclass
class DataReport:
    """What became of every row that was read: `rows_read = samples + rejected + dropped`."""

    rows_read: int = 0
    samples: int = 0
    shortened: int = 0
    dropped: int = 0  # too long
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_tokens_cut: int = 0  # by shortening
    rejected: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> first place and detail

    def lines(self) -> list[str]:
        """The report as text, one line a fact."""
        share = 100 * self.samples / max(self.rows_read, 1)
        lines = [
            f"{self.rows_read:,} rows read, {self.samples:,} kept ({share:.1f}%): "
            f"{self.num_tokens:,} tokens, {self.num_loss_tokens:,} of them with loss"
        ]
        if self.shortened:
            lines.append(f"{self.shortened:,} shortened by {self.num_tokens_cut:,} tokens in all")
        if self.dropped:
            lines.append(f"{self.dropped:,} dropped: too long, first {self.examples['too_long']}")
        for reason, count in self.rejected.most_common():
            lines.append(f"{count:,} rejected: {reason}, first {self.examples[reason]}")
        for note, count in self.noted.most_common():
            lines.append(f"{count:,} noted: {note}")
        return lines


def load_samples(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    max_length: int,
    overlong: Overlong,
    system_prompt: str | None,
    loss_on_prompt: bool = False,
    start: int = 0,
    stop: int | None = None,
) -> tuple[list[Sample], DataReport]:
    """Reads, converts and tokenises rows `start` to `stop` of the files, taken one after the other.

    Args:
      paths: JSONL or Parquet files.
      tokenizer: the model's.
      max_length: most tokens in a sample.
      overlong: what happens to a longer one: "shorten" its reasoning (dropped where that is not
        enough), "drop" it, or "raise".
      system_prompt: put in front of conversations that have no system turn; None for none.
      loss_on_prompt: every token but BOS is a label, not the completion alone.
      start: first row, counted from 0 over all files.
      stop: the row after the last one; None for all.

    Returns:
      The samples in the order of the files, and what became of every row.

    Raises:
      ValueError: a bad file or row (with file:line), no row in the range, no sample left, or a row
        that is too long under "raise".
    """
    if overlong not in ("shorten", "drop", "raise"):
        raise ValueError(f'overlong is "{overlong}"; use shorten, drop or raise')
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    report = DataReport()
    samples: list[Sample] = []
    rows = itertools.chain.from_iterable(read_rows(path) for path in paths)
    conversations = _convert(itertools.islice(rows, start, stop), system_prompt, report)
    while chunk := list(itertools.islice(conversations, _CHUNK_ROWS)):
        encoded = encode_chats(tokenizer, [conversation.turns for _, conversation in chunk])
        for sample in _fit(tokenizer, chunk, encoded, max_length, overlong, report):
            if loss_on_prompt:
                sample = sample._replace(loss_mask=np.arange(len(sample.ids)) > 0)
            report.num_tokens += len(sample.ids)
            report.num_loss_tokens += int(sample.loss_mask.sum())
            samples.append(sample)
    if stop is not None and report.rows_read < stop - start:
        raise ValueError(
            f"{', '.join(map(str, paths))}: rows {start} to {stop} are asked for, but only "
            f"{report.rows_read:,} of these {stop - start:,} are there; lower data.stop"
        )
    report.samples = len(samples)
    if not samples:
        names = ", ".join(str(path) for path in paths) or "no files"
        if not report.rows_read:
            raise ValueError(f"{names}: no rows in the range {start}:{stop or ''}")
        raise ValueError(f"{names}: no sample is left. {'; '.join(report.lines())}")
    return samples, report


def _convert(
    rows: Iterator[tuple[str, dict[str, Any]]], system_prompt: str | None, report: DataReport
) -> Iterator[tuple[str, Conversation]]:
    """Converts rows, counts them in the report, and yields those that were not rejected."""
    for where, row in rows:
        report.rows_read += 1
        try:
            conversation = convert_row(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if isinstance(conversation, Rejected):
            report.rejected[conversation.reason] += 1
            report.examples.setdefault(conversation.reason, f"{where} ({conversation.detail})")
            continue
        report.noted.update(conversation.notes)
        if system_prompt and conversation.turns[0].role != "system":
            system = Turn("system", system_prompt)
            conversation = conversation._replace(turns=(system, *conversation.turns))
        yield where, conversation


def _fit(
    tokenizer: Tokenizer,
    chunk: Sequence[tuple[str, Conversation]],
    encoded: Sequence[Sample],
    max_length: int,
    overlong: Overlong,
    report: DataReport,
) -> list[Sample]:
    """The samples that fit, the shortened ones in their places; counts the others."""
    fitted: list[Sample | None] = list(encoded)
    too_long = [i for i, sample in enumerate(encoded) if len(sample.ids) > max_length]
    chats = [(chunk[i][1], encoded[i]) for i in too_long] if overlong == "shorten" else []
    shorter = shorten(tokenizer, chats, max_length) or [None] * len(too_long)
    for i, result in zip(too_long, shorter, strict=True):
        length = len(encoded[i].ids)
        detail = f"{chunk[i][0]} ({length:,} tokens, limit {max_length:,})"
        if overlong == "raise":
            raise ValueError(f"{detail}: too long; raise max_length, or use shorten or drop")
        if result is None:
            fitted[i] = None
            report.dropped += 1
            report.examples.setdefault("too_long", detail)
        else:
            fitted[i] = result[1]
            report.shortened += 1
            report.num_tokens_cut += length - len(result[1].ids)
    return [sample for sample in fitted if sample is not None]


def batches(
    step_batches: StepBatches, start_step: int = 0, num_threads: int = 2
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) from `start_step` to the last step, read ahead by Grain's threads.

    `num_threads` 0 makes each batch when it is asked for.
    """
    if not 0 <= start_step <= len(step_batches):
        raise ValueError(f"start step {start_step} is not in a run of {len(step_batches)} steps")
    if start_step == len(step_batches):
        return
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    steps = grain.MapDataset.source(step_batches)[start_step:].to_iter_dataset(options)
    yield from enumerate(steps, start_step)
