"""Prepared rows: samples packed into fixed rows, once, kept as plain arrays on disk.

A prepared set is a directory:

    manifest.json        what it was made from, and what became of every row
    tokens.npy           int32 [N], the tokens of all samples, one after the other
    loss_mask.npy        bool [N], where a token is a label
    sample_offsets.npy   int64 [samples + 1]
    sample_rows.npy      int64 [samples], the row that a sample comes from, over all files
    row_samples.npy, row_offsets.npy   int64, which samples stand in which row: packing.PackedRows

Its name is a fingerprint of everything that decides its contents: the files, the tokenizer, the
options and `ROWS_VERSION`. A set that is found under its name therefore is the right one. Opening
it maps the arrays and compares their digests.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os.path
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import sentencepiece

from jaxsft.common.files import array_sha256, read_json, write_json
from jaxsft.common.locks import remove_leftovers, scratch_beside
from jaxsft.config import DataOptions
from jaxsft.data import bins, packing
from jaxsft.data.packing import PackedRows, offsets, rows_digest
from jaxsft.data.rows import ROWS_VERSION
from jaxsft.data.samples import DataReport, SourceSample, as_list, check_any_left, read_samples
from jaxsft.data.sources import ROWS_MANIFEST, file_digest, row_files, stamp
from jaxsft.data.tokenizer import Tokenizer

KIND = "jaxsft prepared rows"
_ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    **dict.fromkeys(("sample_offsets", "row_samples", "row_offsets", "sample_rows"), np.int64),
}
_WRITE_SAMPLES = 512  # collected before they are written
_FILE_DIGESTS = "files.json"
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
      ValueError: as data.read_samples, a file is named twice, no sample left or more than
        `options.max_drop` lost, or a weight for each file is not given.
      OSError: `root` cannot be written.
    """
    remove_leftovers(root)
    files = as_list(files)
    heldout = as_list(heldout_files) if options.drop_contaminated else []
    if options.weights is not None and len(options.weights) != len(files):
        raise ValueError(
            f"data.weights has {len(options.weights)} numbers for {len(files)} files: give one each"
        )
    _check_named_once(files)
    known = _known_digests(root)
    digests = dict(known)
    made_from = _made_from(files, heldout, tokenizer, options, digests)
    if digests != known:
        _keep_digests(root, digests)
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    directory = root / fingerprint[:16]
    if directory.is_dir():
        prepared = open_prepared(directory)
        check_any_left(files, options, prepared.report)
        return prepared
    with _partial_directory(directory) as partial:
        report = DataReport()
        found = read_samples(files, tokenizer, options, report, heldout_files=heldout)
        about = _write_rows(found, files, options, report, partial, progress)
        for file, _ in itertools.chain.from_iterable(map(row_files, (*files, *heldout))):
            if stamp(file) != digests.get(str(file.absolute()), [])[:-1]:
                raise ValueError(f"{file}: was changed while it was read; run it again")
        start = {"kind": KIND, "fingerprint": fingerprint, "made_from": made_from}
        write_json(partial / ROWS_MANIFEST, sealed(start | about))
    return _map_prepared(directory)


def _check_named_once(files: Sequence[Path]) -> None:
    found: dict[str, int] = {}
    for i, entry in enumerate(files):
        for file, _ in row_files(entry):
            other = found.setdefault(os.path.abspath(file), i)
            if other != i:
                raise ValueError(f"{file} is named by {files[other]} and by {entry}; name it once")


def open_prepared(directory: Path) -> Prepared:
    """Maps a prepared set; ValueError where it is none, or not as it was written."""
    try:
        prepared = _map_prepared(directory)
        manifest = prepared.manifest
        intact = (
            sealed(manifest) == manifest
            and array_sha256(prepared.sample_rows).hex() == manifest["sample_rows"]
            and prepared.rows.digest() == manifest["digest"]
        )
    except (OSError, ValueError, TypeError, LookupError, AssertionError):
        intact = False
    if not intact:
        raise ValueError(f"{directory}: damaged, or no prepared rows; delete it, to be made again")
    return prepared


def _map_prepared(directory: Path) -> Prepared:
    """As open_prepared, of a set that was just written: its digests aren't compared."""
    manifest = read_json(directory / ROWS_MANIFEST)
    if manifest["kind"] != KIND:
        raise ValueError(f"{directory / ROWS_MANIFEST}: is not of prepared rows")
    tokens, loss_mask, *small = (
        _map_array(directory / f"{name}.npy", np.dtype(dtype)) for name, dtype in _ARRAYS.items()
    )
    *small, sample_rows = map(np.array, small)  # into memory: looked up at every step
    rows = PackedRows(manifest["row_length"], tokens, loss_mask, *small)
    return Prepared(directory, rows, DataReport(**manifest["report"]), manifest, sample_rows)


def source_of(prepared: Prepared, sample: int) -> str:
    """The raw row that a sample comes from, as "file:row 17" counted from 1."""
    number = int(prepared.sample_rows[sample])
    start = int(prepared.manifest["made_from"]["options"]["start"])
    end = start
    for file, counts in prepared.report.by_source.items():
        begin, end = end, end + counts["rows_read"]
        if number < end:
            # Files before it that were skipped as a whole hide where it begins.
            first = next(iter(prepared.report.by_source))
            if begin == start and start > 0 and file != first:
                break
            return f"{file}:row {number + 1 - (0 if file == first else begin)}"
    return f"row {number + 1:,} over all files"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all else that is in it."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def _map_array(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The one-dimensional array in a .npy file, mapped.

    Its header must be the very one that is written: NumPy's parser of others evaluates a literal,
    which a hostile file can make fail in half a dozen ways.
    """
    length = (path.stat().st_size - len(_header(dtype, 0))) // dtype.itemsize
    header = _header(dtype, length)
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ValueError(f"{path}: is no array of {length} {dtype}")
    return np.memmap(path, dtype, "r", len(header), (length,))


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """Of the same size for any length: NumPy leaves room for its digits."""
    header = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


class _ArrayFile:
    """A one-dimensional .npy file that grows; `sha` is of what was appended."""

    def __init__(self, path: Path, dtype: npt.DTypeLike):
        self._file, self._dtype, self._size = path.open("wb"), np.dtype(dtype), 0
        self.sha = hashlib.sha256()
        self._file.write(_header(self._dtype, 0))

    def append(self, array: npt.NDArray[Any]) -> None:
        assert array.dtype == self._dtype
        self._file.write(array.data)
        self.sha.update(array.data)
        self._size += array.size

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._dtype, self._size))
        self._file.close()


def _write_rows(
    found: Iterator[SourceSample],
    files: Sequence[Path],
    options: DataOptions,
    report: DataReport,
    directory: Path,
    progress: Callable[[DataReport], None],
) -> dict[str, Any]:
    """Writes all arrays, in memory that grows by some hundred bytes a sample; what the rows are.

    Returns the manifest's part on them. Raises ValueError as data.read_samples, and where too few
    samples are left.
    """
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
    uses = packing.samples_of_epoch(sample_sources, options.weights)
    for source, file in enumerate(files):
        num_samples = (sample_sources == source).sum()
        if not num_samples:
            raise ValueError(
                f"{file}: no sample of it is left; leave the file out. {report.why_rejected()}"
            )
        if not (sample_sources[uses] == source).any():
            raise ValueError(
                f"{file}: an epoch has none of its {num_samples} samples; raise its number in "
                "data.weights, or leave the file out"
            )
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
    parts += [array_sha256(array) for array in small.values()]
    return {
        "digest": rows_digest(options.max_length, parts),
        "sample_rows": array_sha256(sample_rows).hex(),
        "row_length": options.max_length,
        "rows": len(assigned),
        "fewest_rows": fewest,  # that any packing needs
        "fill": sum(used) / (len(assigned) * options.max_length),
        "report": dataclasses.asdict(report),
    }


@contextlib.contextmanager
def _partial_directory(directory: Path) -> Iterator[Path]:
    """A new directory that is renamed to `directory` at the end, and removed where that fails."""
    try:
        with scratch_beside(directory) as partial:
            yield partial
            try:
                partial.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was faster
                    raise
    except OSError as error:  # of writing: what cannot be read is a ValueError
        why = error.strerror or error
        raise OSError(
            f"{directory.parent}: {why} while rows were prepared there; make room, or name "
            "another place with data.prepared_dir, or XDG_CACHE_HOME for all that is cached"
        ) from error


def _made_from(
    files: Sequence[Path],
    heldout_files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    digests: dict[str, Any],
) -> dict[str, Any]:
    """Everything that decides the rows, JSON-able; adds to the `digests` of files."""
    kept = dataclasses.asdict(options)
    for name in _NOT_IN_FINGERPRINT:
        del kept[name]

    # With their names, which the report has.
    def digest_all(sets: Sequence[Path]) -> list[list[str]]:
        return [
            [str(path), *(file_digest(file, digests) for file in row_files(path))] for path in sets
        ]

    return {
        "files": digest_all(files),
        "heldout_files": digest_all(heldout_files),
        "tokenizer": tokenizer.digest,
        "options": kept,
        "rows_version": ROWS_VERSION,
        "sentencepiece": sentencepiece.__version__,
    }


def _known_digests(root: Path) -> dict[str, Any]:
    """Digests of files that were computed before; none of a damaged file of them."""
    try:
        return read_json(root / _FILE_DIGESTS)
    except ValueError:
        return {}


def _keep_digests(root: Path, digests: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a set may lie where nothing can be written
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / _FILE_DIGESTS, digests)
