"""Makes samples from raw rows and counts every row that is left out; reads batches with Grain.

Rows are processed in chunks, so memory does not grow with their number. Batches have no iterator
state: the rows of a step follow from its number (`packing.StepBatches`), so a run can resume at any
step.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsft.common.batch import Batch
from jaxsft.common.text import plural, visible_line
from jaxsft.config import DataOptions, RowFileOptions, named_files
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chats, shorten
from jaxsft.data.fields import PARTS
from jaxsft.data.filters import Filter, contaminated, degenerate, duplicates
from jaxsft.data.packing import Sample, StepBatches
from jaxsft.data.replies import Rejected, other_tag
from jaxsft.data.rows import Conversation, RowFields, RowOptions, Turn, convert_row
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer

_CHUNK_ROWS = 512  # conversations that are tokenised together
_MOST_CHARS_PER_TOKEN = 256
_CHUNK_CHARS = 16 * 2**20
_MOST_COLUMNS = 100  # of a file that are named
_SHOWN_COLUMNS = 30
_NUM_REASONS = 3  # in an error
_NUM_EXAMPLES = 2  # of each reason, kept for the report


class SourceSample(NamedTuple):
    """A sample, the index of its file, and its row number over all files, from 0."""

    sample: Sample
    source: int
    row: int


@dataclass
class DataReport:
    """Counts what became of every row that was read: `rows_read = samples + rejected`."""

    rows_read: int = 0
    samples: int = 0
    shortened: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_tokens_cut: int = 0  # by shortening
    rejected: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> places and details
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> rows_read, samples
    # file -> the columns that became part of a sample ("used"), and the others ("unused")
    columns: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def reject(self, where: str, rejected: Rejected) -> None:
        """Counts a row that was left out."""
        self.rejected[rejected.reason] = self.rejected.get(rejected.reason, 0) + 1
        examples = self.examples.setdefault(rejected.reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(f"{where} ({visible_line(rejected.detail)[:160]})")

    def add_columns(self, file: str, fields: RowFields) -> None:
        """Notes which columns of a row were used."""
        columns = self.columns.setdefault(file, {"used": [], "unused": []})
        for kind, names in (("used", fields.used), ("unused", fields.unused)):
            if len(columns[kind]) < _MOST_COLUMNS:
                columns[kind] = sorted({*columns[kind], *names})[:_MOST_COLUMNS]

    @property
    def num_rejected(self) -> int:
        """Number of rows that were left out."""
        return sum(self.rejected.values())

    def why_rejected(self) -> str:
        """The commonest reasons, each with its first example, in about 300 characters."""
        texts = []
        for reason, count in Counter(self.rejected).most_common(_NUM_REASONS):
            place, _, detail = self.examples[reason][0].partition(" (")
            detail = detail.removesuffix(")")
            detail = f"{detail[:69]}…" if len(detail) > 70 else detail
            texts.append(f"{count:,} {reason}, as {_end_of(place, 60)} ({detail})")
        others = len(self.rejected) - len(texts)
        return "; ".join(texts) + (f"; {plural(others, 'other reason')}" if others > 0 else "")

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        share = 100 * self.samples / max(self.rows_read, 1)
        lines = [
            f"{self.rows_read:,} rows read, {self.samples:,} kept ({share:.1f}%): "
            f"{self.num_tokens:,} tokens, {self.num_loss_tokens:,} of them with loss"
        ]
        if len(self.by_source) > 1:
            lines += [
                f"{name}: {counts['rows_read']:,} rows read, {counts['samples']:,} kept"
                for name, counts in self.by_source.items()
            ]
        for name, columns in self.columns.items():
            prefix = f"{name}: " if len(self.columns) > 1 else ""
            used, unused = (_listed_columns(columns[kind]) for kind in ("used", "unused"))
            lines.append(f"{prefix}columns used: {used}; not used: {unused or 'none'}")
        if self.shortened:
            lines.append(f"{self.shortened:,} shortened by {self.num_tokens_cut:,} tokens in all")
        for reason, count in Counter(self.rejected).most_common():
            lines.append(f"{count:,} rejected: {reason}, as {'; '.join(self.examples[reason])}")
        for note, count in Counter(self.noted).most_common():
            lines.append(f"{count:,} noted: {note}")
        return lines


def _listed_columns(names: Sequence[str]) -> str:
    shown = [visible_line(name)[:60] for name in names[:_SHOWN_COLUMNS]]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")


def _end_of(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


class _Row(NamedTuple):
    where: str
    source: int
    number: int
    conversation: Conversation


def row_options(options: DataOptions) -> RowOptions:
    """How `convert_row` converts; ValueError if the options for it contradict each other."""
    template = answer_template(options.answer_template, options.system_prompt)
    if options.columns:
        _check_columns(options.columns)
    return RowOptions(options.columns, options.without_thought, options.earlier_reasoning, template)


def _check_columns(columns: Mapping[str, str]) -> None:
    parts, fault = set(columns), None
    unknown = next((part for part in columns if part not in PARTS), None)
    if unknown is not None:
        fault = f"{unknown!r} is no part of a row; use {', '.join(PARTS)}"
    elif len(set(columns.values())) < len(columns):
        fault = "two parts have the same column"
    elif "reasoning" in parts and "response" not in parts:
        fault = "the reasoning's response is missing"
    elif "messages" not in parts and not {"prompt", "response"} <= parts:
        fault = "name the prompt and the response, or messages"
    if fault is not None:
        raise ValueError(f"data.columns: {fault}")


def answer_template(text: str, system_prompt: str | None) -> AnswerTemplate:
    """The template; ValueError if it is none, or if the system text asks for other tags."""
    try:
        template = AnswerTemplate(text)
    except ValueError as error:
        raise ValueError(f"data.answer_template {text!r}: {error}") from None
    if other := other_tag(system_prompt or "", template):
        raise ValueError(
            f"data.system_prompt asks for {other}, which data.answer_template does not have: "
            "give both, or data.system_prompt null"
        )
    return template


def as_list(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files, directories and patterns that an option names, see `config.named_files`."""
    found: list[Path] = []
    for each in [files] if isinstance(files, str | Path) else files:
        found += [each] if isinstance(each, Path) else map(Path, named_files(each))
    return found


def read_samples(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    report: DataReport,
    *,
    heldout_files: Sequence[Path] = (),
) -> Iterator[SourceSample]:
    """Reads, converts, filters and tokenises the rows of the files, one file after the other.

    Args:
      files: files or directories that `sources.read_rows` reads.
      tokenizer: the model's tokenizer.
      options: which rows, filters and lengths; its file names are not used.
      report: gets the counts of the rows that were read so far.
      heldout_files: rows with prompts that `options.drop_contaminated` leaves out.

    Yields:
      Samples of at most `options.max_length` tokens, in the order of the rows.

    Raises:
      ValueError: a file or row is wrong (with file:line), there are fewer rows than asked for, or
        a row is too long and `options.overlong` is "raise".
    """
    filters: list[Filter] = []
    if options.drop_degenerate:
        filters.append(degenerate)
    if options.drop_contaminated and heldout_files:
        form = options.answer_template
        heldout = DataOptions(columns=options.columns, answer_template=form, system_prompt=None)
        rows = _convert(_numbered_rows(heldout_files, heldout), heldout, [], DataReport())
        filters.append(contaminated([row.conversation for row in rows]))
    if options.drop_duplicates:
        filters.append(duplicates())
    names = [str(file) for file in files]
    report.by_source = {name: {"rows_read": 0, "samples": 0} for name in names}
    rows = _convert(_numbered_rows(files, options), options, filters, report)
    for chunk in _chunks(rows):
        yield from _count(chunk, _encode(tokenizer, chunk, options), names, report)
    if options.stop is not None and report.rows_read < options.stop - options.start:
        raise ValueError(
            f"{', '.join(names)}: rows {options.start} to {options.stop} are asked for, but only "
            f"{report.rows_read:,} of these {options.stop - options.start:,} are there; lower "
            "data.stop"
        )


def check_any_left(files: Sequence[Path], options: RowFileOptions, report: DataReport) -> None:
    """Raises ValueError if no sample is left, or if more than `options.max_drop` were left out."""
    names = _end_of(", ".join(map(str, files)), 120) or "no files"
    if not report.rows_read:
        raise ValueError(f"{names}: no rows in the range {options.start}:{options.stop or ''}")
    if not report.samples:
        raise ValueError(
            f"{names}: no sample is left of {report.rows_read:,} rows: {report.why_rejected()}"
        )
    if report.num_rejected > options.max_drop * report.rows_read:
        raise ValueError(
            f"{names}: {report.num_rejected / report.rows_read:.1%} of {report.rows_read:,} rows "
            f"are left out, more than data.max_drop {options.max_drop:.1%}: {report.why_rejected()}"
        )


def _numbered_rows(
    files: Sequence[Path], options: DataOptions
) -> Iterator[tuple[int, tuple[int, tuple[str, dict]]]]:
    """The rows asked for: (number over all files, (index of the file, (where, row)))."""
    rows = (
        (source, row)
        for source, file in enumerate(files)
        for row in read_rows(file, options.columns)
    )
    return itertools.islice(enumerate(rows), options.start, options.stop)


def _convert(
    rows: Iterator[tuple[int, tuple[int, tuple[str, dict]]]],
    options: DataOptions,
    filters: Sequence[Filter],
    report: DataReport,
) -> Iterator[_Row]:
    """Converts, filters and counts rows; yields those that were not rejected."""
    how = row_options(options)
    counts = list(report.by_source.values())
    names, seen = list(report.by_source), set[tuple[int, RowFields]]()
    for number, (source, (where, row)) in rows:
        report.rows_read += 1
        if counts:
            counts[source]["rows_read"] += 1
        conversation = convert_row(row, how)
        if isinstance(conversation, Rejected):
            report.reject(where, conversation)
            continue
        rejected = _far_too_long(conversation, options.max_length) or next(
            filter(None, (each(conversation) for each in filters)), None
        )
        if rejected is not None:
            if rejected.reason == "too_long" and options.overlong == "raise":
                raise _too_long(where, rejected.detail)
            report.reject(where, rejected)
            continue
        if counts and (source, conversation.fields) not in seen:
            if len(seen) < _MOST_COLUMNS:
                seen.add((source, conversation.fields))
            report.add_columns(names[source], conversation.fields)
        is_plain = "plain_completion" in conversation.notes
        drops_system = is_plain and options.without_thought == "drop_system"
        has_system = conversation.turns[0].role == "system"
        if options.system_prompt and not has_system and not drops_system:
            system = Turn("system", options.system_prompt)
            conversation = conversation._replace(turns=(system, *conversation.turns))
        yield _Row(where, source, number, conversation)


def _far_too_long(conversation: Conversation, max_length: int) -> Rejected | None:
    """Rejects what no shortening could save before it is tokenised, which takes minutes for 16 MiB.

    Gemma's tokens have about 4 characters.
    """
    chars = sum(len(turn.content) for turn in conversation.turns)
    if chars <= _MOST_CHARS_PER_TOKEN * max_length:
        return None
    return Rejected("too_long", f"{chars:,} characters, limit {max_length:,} tokens")


def _too_long(where: str, detail: str) -> ValueError:
    return ValueError(f"{where} ({detail}): too long; raise max_length, or use shorten or drop")


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Rows that are tokenised together: no more than `_CHUNK_ROWS`, or `_CHUNK_CHARS` of text."""
    chunk: list[_Row] = []
    chars = 0
    for row in rows:
        chunk.append(row)
        chars += sum(len(turn.content) for turn in row.conversation.turns)
        if len(chunk) == _CHUNK_ROWS or chars > _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class _Outcome(NamedTuple):
    sample: Sample | Rejected
    num_tokens_cut: int = 0


def _encode(tokenizer: Tokenizer, chunk: Sequence[_Row], options: DataOptions) -> list[_Outcome]:
    """Tokenises rows; shortens, drops or refuses those that are too long."""
    turns_of = [row.conversation.turns for row in chunk]
    encoded = encode_chats(tokenizer, turns_of)
    limit, outcomes = options.max_length, [_Outcome(sample) for sample in encoded]
    too_long = [i for i, sample in enumerate(encoded) if len(sample.ids) > limit]
    chats = [(chunk[i].conversation, encoded[i]) for i in too_long]
    shorten_them = options.overlong == "shorten"
    template = AnswerTemplate(options.answer_template)
    shorter = shorten(tokenizer, chats, limit, template) if shorten_them else [None] * len(too_long)
    for i, result in zip(too_long, shorter, strict=True):
        length = len(encoded[i].ids)
        detail = f"{length:,} tokens, limit {limit:,}"
        if options.overlong == "raise":
            raise _too_long(chunk[i].where, detail)
        if result is None:
            outcomes[i] = _Outcome(Rejected("too_long", detail))
        else:
            outcomes[i] = _Outcome(result[1], length - len(result[1].ids))
    for i, (sample, _) in enumerate(outcomes):
        if not isinstance(sample, Sample):
            continue
        num_trained = int(sample.loss_mask.sum())
        if num_trained < options.min_completion_tokens:
            detail = f"{num_trained} tokens of completion, {options.min_completion_tokens} at least"
            outcomes[i] = _Outcome(Rejected("too_short", detail))
        elif options.loss_on_prompt:
            # In the shortened one only the end differs, which is a label in both.
            start, (whole,) = sample.completion_start, encode_chats(tokenizer, [turns_of[i]], True)
            mask = np.concatenate([whole.loss_mask[:start], sample.loss_mask[start:]])
            outcomes[i] = outcomes[i]._replace(sample=sample._replace(loss_mask=mask))
    return outcomes


def _count(
    chunk: Sequence[_Row], outcomes: Sequence[_Outcome], names: Sequence[str], report: DataReport
) -> Iterator[SourceSample]:
    for row, (sample, num_tokens_cut) in zip(chunk, outcomes, strict=True):
        if isinstance(sample, Rejected):
            report.reject(row.where, sample)
            continue
        report.samples += 1
        for note in row.conversation.notes:
            report.noted[note] = report.noted.get(note, 0) + 1
        report.by_source[names[row.source]]["samples"] += 1
        report.num_tokens += len(sample.ids)
        report.num_loss_tokens += int(sample.loss_mask.sum())
        report.shortened += num_tokens_cut > 0
        report.num_tokens_cut += num_tokens_cut
        yield SourceSample(sample, row.source, row.number)


def batches(
    step_batches: StepBatches, start_step: int = 0, num_threads: int = 2
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) from `start_step` to the last step; threads of Grain read ahead.

    With `num_threads` 0 nothing is read ahead.
    """
    if not 0 <= start_step <= len(step_batches):
        raise ValueError(f"start step {start_step} is not in a run of {len(step_batches)} steps")
    if start_step == len(step_batches):
        return
    import grain  # imports JAX; nothing else on the data side needs it

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    steps = grain.MapDataset.source(step_batches)[start_step:].to_iter_dataset(options)
    yield from enumerate(steps, start_step)
