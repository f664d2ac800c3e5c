"""Prepared rows: samples packed into fixed rows, once, as plain arrays on disk.

A directory named by a fingerprint of everything that decides its contents (files, tokenizer,
template, options, this code), so that nothing stale is ever found under a name:

    manifest.json        what it was made from, and what became of every row
    tokens.npy           int32 [N], the tokens of all samples, one after the other
    loss_mask.npy        bool [N], where a token is a label
    sample_offsets.npy   int64 [samples + 1]
    sample_rows.npy      int64 [samples], the row that a sample comes from, over all files
    row_samples.npy, row_offsets.npy   int64, which samples stand in which row: packing.PackedRows

It is written beside its place and renamed: under its name it is complete. Opening it maps the
arrays and compares their digest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxsft import bins, chat, data, filters, packing, reasoning, sources
from jaxsft.config import DataOptions
from jaxsft.data import DataReport, SourceSample, as_list, check_any_left, read_samples
from jaxsft.json_file import read_json, write_json
from jaxsft.packing import PackedRows, offsets, rows_digest
from jaxsft.sources import MANIFEST, file_digest, row_files
from jaxsft.tokenizer import Tokenizer

KIND = "jaxsft prepared rows"

_ARRAYS = ("tokens", "loss_mask", "sample_offsets", "row_samples", "row_offsets")
_FILE_DIGESTS = "files.json"
_WRITE_SAMPLES = 512  # collected before they are written
# Options that decide where rows are found or how many may be lost, not what they are.
_NOT_IN_FINGERPRINT = ("train_files", "eval_files", "max_drop", "prepared_dir")


class Prepared(NamedTuple):
    """A prepared set, opened. `rows` are mapped from the files; `sample_rows` as in the files."""

    directory: Path
    rows: PackedRows
    report: DataReport
    manifest: dict[str, Any]
    sample_rows: npt.NDArray[np.int64]


def prepare(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    root: Path,
    *,
    heldout_files: str | Path | Sequence[str | Path] = (),
    progress: Callable[[DataReport], None] = lambda report: None,
) -> Prepared:
    """The prepared set of these files and options, made under `root` unless it is there.

    Args:
      files: what `sources.read_rows` reads, one source each.
      tokenizer: the model's.
      options: how; `train_files` and `eval_files` are not looked at.
      root: directory of prepared sets.
      heldout_files: left out of the rows with `options.drop_contaminated`.
      progress: called now and then with the counts so far.

    Raises:
      ValueError: as data.read_samples, no sample left or more than `options.max_drop` lost, or a
        weight for each file is not given. OSError: `root` cannot be written.
    """
    files = as_list(files)
    heldout = as_list(heldout_files) if options.drop_contaminated else []
    if options.weights is not None and len(options.weights) != len(files):
        raise ValueError(
            f"data.weights has {len(options.weights)} numbers for {len(files)} files: give one each"
        )
    made_from = _made_from(files, heldout, tokenizer, options, root)
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    directory = root / fingerprint[:16]
    if directory.is_dir():
        prepared = open_prepared(directory)
        check_any_left(files, options, prepared.report)
        return prepared
    _remove_leftovers(root)
    partial = root / f"{directory.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        report = DataReport()
        found = read_samples(files, tokenizer, options, report, heldout_files=heldout)
        about = _write(found, files, options, report, partial, progress)
        start = {"kind": KIND, "fingerprint": fingerprint, "made_from": made_from}
        write_json(partial / MANIFEST, start | about)
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _map(directory)


def open_prepared(directory: Path) -> Prepared:
    """Maps a prepared set; ValueError where it is none, or not as it was written."""
    try:
        prepared = _map(directory)
        intact = prepared.rows.digest() == prepared.manifest["digest"]
    except (OSError, EOFError, ValueError, TypeError, LookupError, AssertionError):
        intact = False
    if not intact:
        raise ValueError(f"{directory}: damaged, or no prepared rows; delete it, to be made again")
    return prepared


def _map(directory: Path) -> Prepared:
    manifest = read_json(directory / MANIFEST)
    if manifest["kind"] != KIND:
        raise ValueError(f"{directory / MANIFEST}: is not of prepared rows")
    tokens, loss_mask, *small = (
        np.load(directory / f"{name}.npy", mmap_mode="r") for name in (*_ARRAYS, "sample_rows")
    )
    *small, sample_rows = map(np.array, small)  # into memory: looked up at every step
    rows = PackedRows(manifest["row_length"], tokens, loss_mask, *small)
    return Prepared(directory, rows, DataReport(**manifest["report"]), manifest, sample_rows)


@functools.cache
def code_version() -> str:
    """12 hex digits that change with the code that turns rows into packed samples."""
    modules: tuple[ModuleType, ...] = (sources, reasoning, filters, chat, data, bins, packing)
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:12]


def _made_from(
    files: Sequence[Path],
    heldout_files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    root: Path,
) -> dict[str, Any]:
    """Everything that decides the rows, JSON-able."""
    kept = dataclasses.asdict(options)
    for name in _NOT_IN_FINGERPRINT:
        del kept[name]
    known = root / _FILE_DIGESTS
    digests: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # none yet, or a damaged one: only a cache
        digests = read_json(known)
    before = dict(digests)

    def digest_all(sets: Sequence[Path]) -> list[list[str]]:
        return [[file_digest(file, digests) for file in row_files(path)] for path in sets]

    made_from = {
        "files": digest_all(files),
        "heldout_files": digest_all(heldout_files),
        "tokenizer": tokenizer.digest,
        "options": kept,
        "code": code_version(),
    }
    if digests != before:
        root.mkdir(parents=True, exist_ok=True)
        write_json(known, digests)
    return made_from


class _ArrayFile:
    """A one-dimensional .npy file that grows; `sha` is of what was appended."""

    def __init__(self, path: Path, dtype: npt.DTypeLike):
        self._file, self._dtype, self._size = path.open("wb"), np.dtype(dtype), 0
        self.sha = hashlib.sha256()
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room for the first dimension's digits to grow: always of the same length.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, array: npt.NDArray[Any]) -> None:
        assert array.dtype == self._dtype
        self._file.write(array.data)
        self.sha.update(array.data)
        self._size += array.size

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


def _write(
    found: Iterator[SourceSample],
    files: Sequence[Path],
    options: DataOptions,
    report: DataReport,
    directory: Path,
    progress: Callable[[DataReport], None],
) -> dict[str, Any]:
    """Writes all arrays, in memory that grows by some bytes a sample only; what the rows are."""
    places: list[tuple[int, int, int]] = []  # of each sample: length, source, row
    with (
        contextlib.closing(_ArrayFile(directory / "tokens.npy", np.int32)) as tokens,
        contextlib.closing(_ArrayFile(directory / "loss_mask.npy", bool)) as loss_mask,
    ):
        while chunk := list(itertools.islice(found, _WRITE_SAMPLES)):
            places += [(len(each.sample.ids), each.source, each.row) for each in chunk]
            tokens.append(np.concatenate([each.sample.ids for each in chunk]))
            loss_mask.append(np.concatenate([each.sample.loss_mask for each in chunk]))
            progress(report)
    check_any_left(files, options, report)

    lengths, sample_sources, sample_rows = np.array(places, np.int64).T
    uses = _uses(sample_sources, options.weights)
    used = lengths[uses].tolist()
    assigned = (bins.pack if options.packing else bins.one_per_row)(used, options.max_length)
    fewest = bins.min_rows(used, options.max_length) if options.packing else len(assigned)
    small = {
        "sample_offsets": offsets(lengths),
        "row_samples": uses[np.fromiter(itertools.chain.from_iterable(assigned), np.int64)],
        "row_offsets": offsets([len(row) for row in assigned]),
    }
    for name, array in {**small, "sample_rows": sample_rows}.items():
        np.save(directory / f"{name}.npy", np.ascontiguousarray(array))
    parts = [file.sha.digest() for file in (tokens, loss_mask)]
    parts += [hashlib.sha256(array.data).digest() for array in small.values()]
    return {
        "digest": rows_digest(options.max_length, parts),
        "row_length": options.max_length,
        "rows": len(assigned),
        "fewest_rows": fewest,  # that any packing needs
        "fill": sum(used) / (len(assigned) * options.max_length),
        "report": dataclasses.asdict(report),
    }


def _uses(
    sample_sources: npt.NDArray[np.int64], weights: Sequence[float] | None
) -> npt.NDArray[np.int64]:
    """The samples of an epoch, int64: of a source with weight w all floor(w) times, and of one more
    time the share that is left, drawn by a fixed seed; in the order of the files."""
    if weights is None:
        return np.arange(len(sample_sources))
    parts = []
    for source, weight in enumerate(weights):
        samples = np.flatnonzero(sample_sources == source)
        order = packing.epoch_order(0, source, len(samples))
        some = np.sort(samples[order[: round(weight % 1 * len(samples))]])
        parts += [*[samples] * int(weight), some]
    return np.sort(np.concatenate(parts)).astype(np.int64)


def _remove_leftovers(root: Path) -> None:
    """Removes what processes that are gone left half-written."""
    for partial in root.glob("*.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(partial, ignore_errors=True)
